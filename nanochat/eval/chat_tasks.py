"""Scores of a chat model on graded tasks, by letting it answer."""

from nanochat.inference.chat import ChatModel
from nanochat.inference.detokenizer import reply_parts
from nanochat.inference.sampling_params import SamplingParams
from nanochat.tasks.task import GradedTask


def score(chat: ChatModel, task: GradedTask, sampling: SamplingParams, most: int) -> float:
    """Mean grade, 0 to 1, of the replies to the first `most` problems."""
    problems = [task[i] for i in range(min(len(task), most))]
    completions = chat.engine.generate([chat.prompt(task.prompt(problem)) for problem in problems], sampling)
    grades = [
        task.grade(problem, reply_parts(chat.tokenizer, completion.tokens))
        for problem, completion in zip(problems, completions, strict=True)
    ]
    return sum(grades) / len(grades)
