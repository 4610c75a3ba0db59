"""What the four scripts share: settings, audio, manifests, feature files, the models and their training.

Importing this package makes `cosyvoice` importable too, from the CosyVoice folder of this repository, unless another
installation of it comes first.
"""

import importlib.util
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("cosyvoice") is None:
    sys.path.append(str(REPOSITORY / "CosyVoice"))
