"""What the four scripts share: settings, audio, manifests, feature files, the models and their training.

Importing this package makes `cosyvoice` importable too: that of this repository's CosyVoice folder, whatever else of
that name is installed. `cosyvoice` needs nothing of `taste`.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

if sys.path[0] != str(REPOSITORY / "CosyVoice"):
    sys.path.insert(0, str(REPOSITORY / "CosyVoice"))
