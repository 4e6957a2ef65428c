"""One thin entry module per job."""

import os
import signal
import sys

if sys.argv[0] == "-m":
    # `python -m scripts.NAME` imports torch next, which takes seconds: Ctrl-C ends it without a traceback until
    # nanochat.cli.run handles it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # SIGUSR1 saves a checkpoint during training; before and after, it would end the process.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)

if (folder := os.environ.get("TORCHINDUCTOR_CACHE_DIR")) is not None:
    # torch creates it when it is imported, which is before nanochat.cli.run handles errors.
    try:
        os.makedirs(os.path.abspath(folder), exist_ok=True)
    except OSError as error:
        print(f"error: TORCHINDUCTOR_CACHE_DIR: {error.strerror}: {folder!r:.200}: unset it", file=sys.stderr)
        sys.exit(2)
