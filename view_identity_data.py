#!/usr/bin/env python3
"""Look at the identity conversations, check them, add to them and export them; --help lists the commands."""

from scripts.in_venv import run_in_venv

run_in_venv("scripts.identity_data")
