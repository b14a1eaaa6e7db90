"""An augmenter that asks a generator."""

from collections.abc import Iterator, Sequence

from luthier.api import Augmenter, Generator, Message, Row, Sampling
from luthier.artifacts.rows import prompt_of

from luthier_thirdparty.config import AskedConfig


class Asked(Augmenter[AskedConfig]):
    """Every prompt with an answer of the generator."""

    def rows(self, rows: Sequence[Row]) -> Iterator[Row]:
        prompts = [prompt_of(row) for row in rows]
        sampling = Sampling(max_new_tokens=self.config.max_new_tokens, seed=self.context.seed)
        generator: Generator
        with self.context.build(self.config.generator) as generator:
            for prompt, (answer,) in zip(prompts, generator.generate(prompts, sampling), strict=True):
                if answer.text.strip():
                    yield {"messages": [*prompt, Message(role="assistant", content=answer.text)]}
