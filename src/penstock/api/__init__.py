"""The native API's answers and events, as types: what the gateway writes and every client of ours reads.

A field without a default is in every answer, as null where there is nothing to tell. A field with a default (None) is
left out instead. The types say nothing of fields that they don't know: a client ignores them.
"""

from __future__ import annotations

from penstock.api.errors import Error, ErrorBody
from penstock.api.events import (
    DoneEvent,
    ErrorEvent,
    JobCompleteEvent,
    TokenEvent,
    TopLogprobView,
    UserErrorEvent,
    UserTokenEvent,
)
from penstock.api.jobs import (
    Deleted,
    FunctionCall,
    Generated,
    JobPage,
    JobResult,
    JobSummary,
    JobView,
    Links,
    Submitted,
    Timings,
    ToolCallView,
    UsageView,
)
from penstock.api.models import ModelList, ModelView
from penstock.api.stats import Distribution, Stats

__all__ = [
    "Deleted",
    "Distribution",
    "DoneEvent",
    "Error",
    "ErrorBody",
    "ErrorEvent",
    "FunctionCall",
    "Generated",
    "JobCompleteEvent",
    "JobPage",
    "JobResult",
    "JobSummary",
    "JobView",
    "Links",
    "ModelList",
    "ModelView",
    "Stats",
    "Submitted",
    "Timings",
    "TokenEvent",
    "ToolCallView",
    "TopLogprobView",
    "UsageView",
    "UserErrorEvent",
    "UserTokenEvent",
]
