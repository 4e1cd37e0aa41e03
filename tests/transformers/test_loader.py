"""transformers' own loader of GGUF files: where it is right, and what it ignores."""

from collections.abc import Callable

import pytest
import torch

from tests.support.torch.tiny.architectures import RECIPES
from tests.support.torch.tiny.files import TinyModel, load
