"""Deployment: policies for plain loops, exported single steps, and folders to share."""

from .export import export_step as export_step
from .pretrained import PretrainedError as PretrainedError
from .pretrained import load_pretrained as load_pretrained
from .pretrained import read_arguments as read_arguments
from .pretrained import save_pretrained as save_pretrained
from .stateful import StatefulPolicy as StatefulPolicy
