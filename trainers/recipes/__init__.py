"""The methods, one file each."""

from . import attndreambooth, textboost, textboost2026

# Display name of a node -> its presets, the first of which is the default.
METHODS = {
    "TextBoost": textboost.PRESETS | textboost2026.PRESETS,
    "AttnDreamBooth": attndreambooth.PRESETS,
}
