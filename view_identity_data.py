#!/usr/bin/env python3
"""View, check, extend and convert identity conversations, or other data with --file; --help lists the commands."""

from scripts.venv import run_in_venv

run_in_venv("scripts.identity_data")
