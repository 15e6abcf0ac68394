"""Checks the login and uploads a file, with limits of a second; prints a JSON list of the two errors.

python call_stalled_hub.py REPO PARENT
"""

import json
import sys
from pathlib import Path

from huggingface_hub import HfApi

from vit_simple.files import NETWORK_ERRORS
from vit_simple.sharing import network
from vit_simple.sharing.commit import upload

network.LINES, network.WAITS, network.PATIENCE = (0.1, 0.1), (0.1,), 1
network.limit_requests(connect=1, silence=1)
repo, parent = sys.argv[1:]
Path("README.md").write_text("text")
api, errors = HfApi(), []
calls = [
    lambda: network.with_retries("checking the login", api.whoami),
    lambda: upload(api, repo, Path(), ["README.md"], parent, "push"),
]
for call in calls:
    try:
        errors.append(call())
    except NETWORK_ERRORS as error:
        errors.append(str(error))
print(json.dumps(errors))
