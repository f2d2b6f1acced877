"""Words and prompts of the built-in causal models that no other task has."""

from __future__ import annotations

from itertools import combinations

from interv.task.behaviours import CAPITALS_OF, GENDERED_PRONOUNS
from interv.task.ioi import IOI

CAPITAL = tuple(t.replace("{COUNTRY}", "{country}") for t in CAPITALS_OF.templates)
GENDER = tuple(t.replace("{NAME}", "{name}") for t in GENDERED_PRONOUNS.templates)


def _giving(text: str) -> str:
    """A template of the IOI task with its three names by their places in the text."""
    text = text.replace("{IO}", "{first}").replace("{S}", "{second}", 1)
    text = text.replace("{S}", "{repeated}")
    return text.replace("{PLACE}", "{place}").replace("{OBJECT}", "{object}")


GIVING = tuple(map(_giving, IOI.templates))

# Two solved ones first: without them a small model goes on with anything.
BOOLEAN = (
    "(True or False) and False = False\n(False or False) or True = True\n"
    "({a} {inner} {b}) {outer} {c} =",
)
ARITHMETIC = ("1+2+1=4\n0+3+5=8\n{a}+{b}+{c}=",)

# As in the authors' code for Alpaca-7B, which answers without a space.
PRICE = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nPlease say yes only if it costs between {low} and {high} dollars, "
    "otherwise no.\n\n### Input:\n{amount} dollars\n\n### Response:\n",
)

_OPTIONS = "".join(f"\n{{letter{i}}}. {{colour{i}}}" for i in range(1, 5)) + "\nAnswer:"
CHOICE = (
    "Question: A {thing} is {fact}. What colour is the {thing}?" + _OPTIONS,
    "Question: The colour of my {thing} is {fact}. Which colour is it?" + _OPTIONS,
    "Question: There is a {fact} {thing} here. What is its colour?" + _OPTIONS,
)
# Four options have neighbouring letters; from which one on says which answer a place has.
LETTERS = ("ABCD", "EFGH", "IJKL", "MNOP", "QRST", "UVWX")
ALL_DIFFERENT = [f"colour{a} != colour{b}" for a, b in combinations(range(1, 5), 2)]

ENTAILMENT = (
    "Premise: There are {quantity} {premise} in the picture.\n"
    "Hypothesis: There are {quantity} {hypothesis} in the picture.\n"
    "Does the hypothesis follow from the premise? Yes or No?\nAnswer:",
    "If there are {quantity} {premise} in the town, does it follow that there are {quantity} "
    "{hypothesis} in the town? Answer Yes or No.\nAnswer:",
)
_WIDER = {
    "animals": "dogs cats horses birds cows pigs rabbits lions tigers bears wolves mice frogs bees",
    "plants": "trees flowers roses vegetables grasses herbs mushrooms",
    "vehicles": "cars trucks buses bikes trains boats ships planes",
    "tools": "hammers knives saws needles",
    "instruments": "guitars drums pianos trumpets",
    "people": "women doctors teachers students soldiers farmers artists children lawyers nurses",
    "buildings": "houses schools churches hospitals hotels castles towers",
    "clothes": "shirts hats coats socks shoes dresses",
}
WIDER = {narrow: wide for wide, words in _WIDER.items() for narrow in words.split()}
"""A plural, and one that holds of whatever the first holds of."""
