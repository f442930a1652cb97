"""Deployment: policies for plain loops, and exported single steps."""

from .export import export_step as export_step
from .stateful import StatefulPolicy as StatefulPolicy
