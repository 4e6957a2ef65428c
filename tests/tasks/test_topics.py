from nanochat.data import demo_data
from nanochat.tasks.encyclopedia import Topics


def test_the_letter_stands_for_the_article_s_own_description() -> None:
    topics = Topics()
    descriptions = {article.title: article.description for article in demo_data.articles("train")}
    for index in range(0, len(topics), 500):
        question, answer = (message["content"] for message in topics[index]["messages"])
        title, *lines, _ = str(question).splitlines()
        choices = dict(line.split(") ", 1) for line in lines)
        assert len(set(choices.values())) == 4
        assert choices[str(answer)] == descriptions[title.removeprefix("What is ").removesuffix("?")]


def test_every_letter_is_right_sometimes() -> None:
    assert {topic["messages"][-1]["content"] for topic in list(Topics())[:60]} == set("ABCD")
