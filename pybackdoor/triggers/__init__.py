"""Triggers: data (a frozen spec), bound to an image size, applied by one code path."""

from pybackdoor.triggers.bound import BoundTrigger, apply_trigger, bind
from pybackdoor.triggers.catalogue import PLACEMENTS, TRIGGERS, Definition, resolve
from pybackdoor.triggers.files import file_sha256
from pybackdoor.triggers.spec import TriggerSpec, trigger

__all__ = [
    "PLACEMENTS",
    "TRIGGERS",
    "BoundTrigger",
    "Definition",
    "TriggerSpec",
    "apply_trigger",
    "bind",
    "file_sha256",
    "resolve",
    "trigger",
]
