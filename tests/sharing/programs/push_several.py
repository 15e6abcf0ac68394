"""Runs push_to_hub.py with several lists of arguments; the last line is a JSON list of what each of them printed."""

import contextlib
import io
import json
import sys

from vit_simple.push_to_hub import main

outputs = []
for arguments in json.loads(sys.argv[1]):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), contextlib.suppress(SystemExit):
        main(arguments)
    outputs.append(output.getvalue())
print(json.dumps(outputs))
