from nanochat.conversations import find_problem, text_of
from nanochat.tasks.refusals import HARMFUL, HARMLESS, Refusals


def test_all_are_short_valid_conversations() -> None:
    rows = list(Refusals())
    assert not [row for row in rows if find_problem(row) or len(text_of(row["messages"][1])) > 130]
    assert sum(len(requests) for requests, _ in HARMFUL.values()) >= 55
    assert len(HARMLESS) >= 30


def test_harmful_requests_are_refused_and_harmless_ones_answered() -> None:
    refusals = ("I can't help with", "I won't", "call a crisis line")
    for requests, answers in HARMFUL.values():
        assert len(set(requests)) == len(requests)
        assert all(any(refusal in answer for refusal in refusals) for answer in answers)
    assert not [answer for _, answer in HARMLESS if any(refusal in answer for refusal in refusals)]


def test_no_harmless_question_is_refused_elsewhere() -> None:
    harmful = {request for requests, _ in HARMFUL.values() for request in requests}
    assert not harmful & {question for question, _ in HARMLESS}
