"""The folder of a run or a conversion comes in; a record, a model card and a verified upload go out."""

from .network import LIMITS, limit_requests

limit_requests(*LIMITS)  # for every request of a process that shares something
