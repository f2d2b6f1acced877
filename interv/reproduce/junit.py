"""Outcomes as JUnit XML, which CI services show: a suite for each spec, a case for each claim."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from interv.reproduce.outcome import Outcome

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(outcomes: Sequence[Outcome]) -> bytes:
    """The XML, with its declaration."""
    root = ElementTree.Element("testsuites", name="interv reproduce")
    for outcome in outcomes:
        root.append(_suite(outcome))
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _suite(outcome: Outcome) -> ElementTree.Element:
    suite = ElementTree.Element(
        "testsuite", name=_text(str(outcome.spec)), time=f"{outcome.seconds:.1f}"
    )
    for verdict in outcome.verdicts:
        case = _case(suite, outcome, verdict.claim)
        if verdict.word == "missed":
            message = f"found {verdict.told}, wanted {verdict.wanted}"
            failure = ElementTree.SubElement(case, "failure", message=_text(message))
            failure.text = _text(f"{verdict.source}\n{outcome.command}")
        elif verdict.word != "holds":
            why = "missed, which is to be noted only" if verdict.word == "noted" else "not in grid"
            message = f"{why}: found {verdict.told}, wanted {verdict.wanted}"
            ElementTree.SubElement(case, "skipped", message=_text(message))
    if outcome.status == "failed":
        case = _case(suite, outcome, "the run")
        first = outcome.reason.splitlines()[0] if outcome.reason else ""
        ElementTree.SubElement(case, "error", message=_text(first)).text = _text(outcome.reason)
    if outcome.status == "not run":
        case = _case(suite, outcome, f"{outcome.claims} claims")
        ElementTree.SubElement(case, "skipped", message=_text(outcome.reason))
    counts = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    suite.set("tests", str(len(suite)))
    for name, tag in counts.items():
        suite.set(name, str(len(suite.findall(f"./testcase/{tag}"))))
    return suite


def _case(suite: ElementTree.Element, outcome: Outcome, name: str) -> ElementTree.Element:
    label = _text(outcome.label.replace("/", "."))
    return ElementTree.SubElement(suite, "testcase", classname=label, name=_text(name))


def _text(text: str) -> str:
    """Text without the characters that XML cannot hold."""
    return _NOT_IN_XML.sub("\N{REPLACEMENT CHARACTER}", text)
