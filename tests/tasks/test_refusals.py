from nanochat.conversation_files import find_problem
from nanochat.conversations import text_of
from nanochat.tasks.mixtures import load_mixture

REFUSALS = ("I can't help with", "I won't", "call a crisis line")


def test_harmful_requests_are_refused_and_harmless_ones_answered() -> None:
    rows = list(load_mixture("sft", ["refusals"], only=True))
    assert not [row for row in rows if find_problem(row) or len(text_of(row["messages"][1])) > 130]
    refused: set[str] = set()
    answered: list[str] = []
    for row in rows:
        question, reply = map(text_of, row["messages"])
        if any(refusal in reply for refusal in REFUSALS):
            refused.add(question)
        else:
            answered.append(question)
    assert len(refused) >= 55 and len(answered) == len(set(answered)) >= 30
    assert not refused & set(answered)
