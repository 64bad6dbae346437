"""The page of questions: there are forty, each has an answer, and every link names a heading that exists."""

import re

import nbformat
import pytest

import vae_helpers as vh

PAGE = vh.ROOT / "notebooks" / "questions.md"
TEXT = PAGE.read_text(encoding="utf-8")
QUESTIONS = re.findall(r"(?ms)^### (\d+)\. (\S[^\n]*)\n(.*?)(?=^##|\Z)", TEXT)  # number, question, answer
LINK = r"\[([^\]]+)\]\(([^\s()#]+)#((?:[^\s()]|\([^\s()]*\))+)\)"  # text, file, fragment
LINKS = [(" ".join(text.split()), file, fragment) for text, file, fragment in re.findall(LINK, TEXT)]


def test_there_are_forty_questions_in_order():
    assert [int(number) for number, _, _ in QUESTIONS] == list(range(1, 41))


@pytest.mark.parametrize(("number", "question", "answer"), QUESTIONS, ids=[number for number, _, _ in QUESTIONS])
def test_a_question_has_an_answer_and_a_source(number, question, answer):
    words = re.sub(rf"\bSee {LINK}|{LINK}", "", answer).split()
    assert len(words) >= 10, f"question {number}, {question}: the answer has {len(words)} words"
    assert re.search(rf"{LINK}|arXiv\s\d{{4}}\.\d{{5}}", answer), f"question {number}, {question}: no link, no paper"


def test_every_link_is_read_by_these_tests():
    assert len(LINKS) == TEXT.count("](") > 40


@pytest.mark.parametrize("file", sorted({file for _, file, _ in LINKS}))
def test_links_name_a_heading_of_their_notebook(file):
    cells = nbformat.read(PAGE.parent / file, as_version=4).cells
    prose = "\n".join(re.sub(r"(?s)```.*?```", "", cell.source) for cell in cells if cell.cell_type == "markdown")
    titles = {heading.replace(" ", "-"): f"{file[:2]}, {heading}" for heading in re.findall(r"(?m)^#+ (.*\S)", prose)}
    for text, _, fragment in [link for link in LINKS if link[1] == file]:
        assert fragment in titles, f"{file} has no heading {fragment}"
        assert text == titles[fragment]
