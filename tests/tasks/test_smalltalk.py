from nanochat.data import embedded
from nanochat.tasks.smalltalk import SmallTalk


def test_test_conversations_are_the_held_out_ones() -> None:
    assert list(SmallTalk("test")) == embedded.chitchat("val")
    assert list(SmallTalk("train")) == embedded.chitchat("train")
