"""The page on which people compare answers: one file, without network, for keyboard, mouse and phone."""

from __future__ import annotations

import html
import json

from luthier.reporting.data_page import whole_page
from luthier.reporting.verdicts import KIND, Comparison

TITLE = "Which answer is better?"
STYLE = """
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; } .text { white-space: pre-wrap; }
@media (max-width: 44rem) { .pair { grid-template-columns: 1fr; } }
.card h2 { margin: 0 0 .4rem; font-size: 1rem; color: var(--soft); }
.buttons { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0; position: sticky; bottom: 0; padding: .5rem 0;
  background: var(--paper); }
button { font: inherit; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .5rem .8rem; flex: 1 1 auto; cursor: pointer; } button:hover { border-color: var(--strong); }
button[aria-pressed=true] { border-color: var(--strong); border-width: 2px; font-weight: 600; }
kbd { color: var(--soft); font: .8em ui-monospace, monospace; } progress { width: 100%; } a { color: var(--strong); }
pre { white-space: pre-wrap; } [hidden] { display: none !important; }
"""
SCRIPT = """
"use strict";
const about = JSON.parse(document.getElementById("pairs").textContent);
const at = id => document.getElementById(id);
const storage = "luthier-verdicts-" + about.of;
let verdicts = about.known, place = 0;
if (!about.served) {
  // A browser may forbid it, as for files: then verdicts last as long as the page.
  try { verdicts = JSON.parse(localStorage.getItem(storage)) || {}; } catch (error) { verdicts = {}; }
}
const next = from => {
  for (let i = from; i < about.pairs.length; i++) if (!(about.pairs[i].row in verdicts)) return i;
  return about.pairs.length;
};
const file = () => JSON.stringify({kind: about.kind, of: about.of, judge: at("judge").value || "somebody", verdicts});
async function save() {
  if (about.served) {
    try {
      const headers = {"Content-Type": "application/json"};
      const reply = await fetch("verdicts", {method: "POST", headers, body: file()});
      at("problem").textContent = reply.ok ? "" : "Not saved: " + await reply.text();
    } catch (error) { at("problem").textContent = "Not saved: the program that serves this page is gone."; }
  } else {
    try { localStorage.setItem(storage, JSON.stringify(verdicts)); at("problem").textContent = ""; }
    catch (error) { at("problem").textContent = "This browser keeps nothing: save the file before you leave."; }
  }
}
function show() {
  const done = Object.keys(verdicts).length, total = about.pairs.length, pair = about.pairs[place];
  at("progress").value = done; at("count").textContent = `${done} of ${total} judged`;
  at("judging").hidden = !pair; at("end").hidden = Boolean(pair);
  if (!pair) { finish(); return; }
  for (const part of ["prompt", "left", "right"]) at(part).textContent = pair[part];
  for (const button of document.querySelectorAll("button[data-verdict]"))
    button.setAttribute("aria-pressed", String(verdicts[pair.row] === button.dataset.verdict));
  at("number").textContent = `Pair ${place + 1} of ${total}`;
  window.scrollTo(0, 0);
}
async function give(verdict) {
  if (place >= about.pairs.length) return;
  verdicts[about.pairs[place].row] = verdict;
  const later = next(place + 1);
  place = later < about.pairs.length ? later : next(0);
  show();
  await save();
  if (place >= about.pairs.length) finish();
}
function back() { if (place > 0) { place -= 1; show(); } }
async function finish() {
  at("save").href = URL.createObjectURL(new Blob([file()], {type: "application/json"}));
  if (!about.served) return;
  try { at("outcome").textContent = await (await fetch("outcome")).text(); } catch (error) { return; }
}
const keys = {ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", t: "tie", b: "bad", s: "skip"};
document.addEventListener("keydown", event => {
  if (event.target === at("judge") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (keys[event.key]) { event.preventDefault(); give(keys[event.key]); }
  else if (event.key === "ArrowUp" || event.key === "Backspace") { event.preventDefault(); back(); }
});
for (const button of document.querySelectorAll("button[data-verdict]"))
  button.addEventListener("click", () => give(button.dataset.verdict));
for (const button of document.querySelectorAll("button.back")) button.addEventListener("click", back);
at("judge").addEventListener("change", save);
place = next(0);
show();
"""
BUTTONS = {
    "left": ("Left is better", "←"),
    "tie": ("As good", "↓"),
    "right": ("Right is better", "→"),
    "bad": ("Both are bad", "b"),
    "skip": ("Skip", "s"),
}


def page(comparison: Comparison, judge: str = "", known: dict[int, str] | None = None, *, served: bool = False) -> str:
    """The whole page. It does not say whose answers are whose, nor what the models are called.

    Args:
        comparison: What is compared.
        judge: Who judges, where that is known.
        known: Verdicts that were given before.
        served: Whether a program serves the page, which keeps verdicts and says what came of them.
    """
    about = {
        "kind": KIND,
        "of": comparison.digest,
        "served": served,
        "known": {str(row): verdict for row, verdict in (known or {}).items()},
        "pairs": [
            {"row": pair.row, "prompt": pair.prompt, "left": pair.left, "right": pair.right}
            for pair in comparison.pairs
        ],
    }
    # What answers hold must not end the script that holds them.
    data = json.dumps(about, ensure_ascii=True).replace("<", "\\u003c")
    buttons = "".join(
        f"<button type=button data-verdict={name}>{text} <kbd>{key}</kbd></button>"
        for name, (text, key) in BUTTONS.items()
    )
    back = "<button type=button class=back>Back <kbd>↑</kbd></button>"
    after = "What came of it" if served else "Save the file, and send it to whoever sent you this page"
    body = (
        f"<h1>{TITLE}</h1>"
        f"<progress id=progress max={len(comparison.pairs)} value=0 aria-label='Pairs that are judged'></progress>"
        "<p class=summary><span id=count aria-live=polite></span> · <label>Your name: "
        f'<input id=judge value="{html.escape(judge)}" autocomplete=off></label></p><p id=problem role=alert></p>'
        "<div id=judging><p class=summary id=number></p><div class=card><h2>Asked</h2><div class=text id=prompt></div>"
        "</div><br><div class=pair><div class=card><h2>Left</h2><div class=text id=left></div></div>"
        "<div class=card><h2>Right</h2><div class=text id=right></div></div></div>"
        f"<div class=buttons>{buttons}{back}</div></div>"
        f"<div id=end hidden><h2>{after}</h2><pre id=outcome></pre>"
        f"<p><a id=save download=verdicts.json>Save the verdicts</a></p>{back}</div>"
    )
    scripts = f"<script type='application/json' id=pairs>{data}</script><script>{SCRIPT}</script>"
    return whole_page(TITLE, body, STYLE, behind=scripts)
