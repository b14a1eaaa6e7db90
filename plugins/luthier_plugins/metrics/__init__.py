"""The metrics that come with Luthier."""

from luthier.api import Component, hookimpl

_METRICS = {
    "exact_match": ("ExactMatch", "exact_match", "The share of answers that equal the reference"),
    "numeric": ("Numeric", "numeric", "The share of answers whose last number is that of the reference"),
    "f1": ("F1", "overlap", "How many words answer and reference have in common, as SQuAD counts them"),
    "bleu": ("Bleu", "overlap", "BLEU of all answers together, by sacrebleu"),
    "chrf": ("Chrf", "overlap", "chrF of all answers together, by sacrebleu"),
    "rouge": ("Rouge", "overlap", "The mean ROUGE of answers, by rouge-score"),
    "regex": ("Regex", "form", "The share of answers that a pattern is found in"),
    "json_valid": ("JsonValid", "form", "The share of answers that are JSON"),
    "json_schema": ("JsonSchema", "form", "The share of answers that are JSON and follow a schema"),
    "length": ("Length", "form", "The mean length of answers"),
    "repetition": ("Repetition", "form", "The share of runs of four words that an answer has said before"),
    "multiple_choice": (
        "MultipleChoice",
        "likelihood",
        "The share of rows whose reference the model takes for likeliest",
    ),
    "token_accuracy": (
        "TokenAccuracy",
        "likelihood",
        "The share of the reference's tokens that are the model's likeliest",
    ),
    "agreement": ("Agreement", "likelihood", "The share of tokens of which another model has the same likeliest"),
    "kl": ("Kl", "likelihood", "How far the model's distributions are from another's, in nats per token"),
    "pass_at_k": ("PassAtK", "several", "The probability that one of k drawn answers is right"),
    "math": (
        "Math",
        "mathematics",
        "The share of answers that are mathematically equal to the reference, by math-verify",
    ),
    "code_runs": ("CodeRuns", "code", "The share of answers whose code passes the row's tests, run on this machine"),
    "judge": ("JudgeMark", "judged", "The mean mark that a generator gives to answers"),
    "win_rate": ("WinRate", "judged", "How often a generator prefers the model's answer to another model's"),
    "perplexity": ("Perplexity", "perplexity", "The exponential of the mean loss per target token, or per byte"),
}


@hookimpl
def luthier_components() -> list[Component]:
    return [
        Component(
            kind="metric",
            name=name,
            summary=summary,
            config=f"luthier_plugins.metrics.config:{impl}Config",
            impl=f"luthier_plugins.metrics.{module}:{impl}",
        )
        for name, (impl, module, summary) in _METRICS.items()
    ]
