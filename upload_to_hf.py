#!/usr/bin/env python3
"""Upload the folders that hf_prepare.sh wrote to the Hugging Face Hub: python upload_to_hf.py --username NAME."""

from scripts.venv import run_in_venv

run_in_venv("scripts.hf_upload")
