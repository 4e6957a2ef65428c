"""Logging of the server's processes: repeated lines once per minute, so that clients cannot fill the disk."""

import logging

REPEAT_SECONDS = 60.0


class RepeatFilter(logging.Filter):
    """Drops records that repeat a message within REPEAT_SECONDS, and adds their number to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self._logged: dict[tuple[str, str, object], tuple[float, int]] = {}  # time of the last one, dropped since

    def filter(self, record: logging.LogRecord) -> bool:
        first_line, *_ = record.getMessage().splitlines() or [""]  # asyncio adds lines that differ
        key = (record.name, first_line, record.exc_info and record.exc_info[0])
        logged, dropped = self._logged.get(key, (0.0, 0))
        if record.created - logged < REPEAT_SECONDS:
            self._logged[key] = (logged, dropped + 1)
            return False
        self._logged[key] = (record.created, 0)
        if dropped:
            record.msg, record.args = f"{record.getMessage()} ({dropped} more since the last time)", None
        return True


def configure_logging() -> None:
    """Log warnings and errors of all packages to stderr, unless the program has configured logging."""
    handler = logging.StreamHandler()
    handler.addFilter(RepeatFilter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, format="%(asctime)s %(levelname)s: %(message)s")
    # Clients often disconnect in the middle of a stream; asyncio would log a warning for every late write.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
