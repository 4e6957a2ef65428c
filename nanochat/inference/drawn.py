"""What a step has drawn, on its way from the device to the host."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.inference.request import Request, TokenLogprob


@dataclass(frozen=True)
class Drawn:
    """One token for each of some requests; on CUDA the host need not wait for them until it wants to know."""

    requests: list[Request]
    places: list[int]
    """where in its request each token belongs"""
    results: list[Tensor]
    """tokens (N,); for the rows with logprobs also theirs, the likeliest's, and the ids of these"""
    logprob_rows: list[int]
    arrival: torch.cuda.Event | None

    @classmethod
    def sent_to_host(
        cls, requests: list[Request], places: list[int], results: Sequence[Tensor], logprob_rows: list[int]
    ) -> "Drawn":
        """Begin to copy the results, without waiting for the device."""
        on_host = [result.to("cpu", non_blocking=True) for result in results]
        arrival = None
        if results[0].is_cuda:
            arrival = torch.cuda.Event()
            arrival.record()
        return cls(requests, places, on_host, logprob_rows, arrival)

    def tokens(self) -> list[int]:
        """What was drawn; waits for it."""
        if self.arrival:
            self.arrival.synchronize()
        return self.results[0].tolist()

    def logprobs(self) -> dict[int, TokenLogprob]:
        """By row, for the rows that want to know."""
        if not self.logprob_rows:
            return {}
        tokens = self.tokens()
        chosen, top, ids = (result.tolist() for result in self.results[1:])
        found = {}
        for i, row in enumerate(self.logprob_rows):
            likeliest = zip(ids[i], top[i], strict=True)
            count = self.requests[row].sampling.logprobs
            found[row] = TokenLogprob(tokens[row], chosen[i], tuple(itertools.islice(likeliest, count)))
        return found
