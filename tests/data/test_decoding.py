"""Decoding in worker processes; tests/tokenizer/test_tokenize.py shows that workers change no byte."""

import subprocess
import sys


def test_workers_import_no_torch() -> None:
    code = "import sys, st_ar.data.decoding; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
