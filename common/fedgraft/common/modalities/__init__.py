"""The modalities, which are the kinds of input of backbones: one file for each, and their table."""

from fedgraft.common.modalities.audio import Audio
from fedgraft.common.modalities.base import Modality, Processor
from fedgraft.common.modalities.image import Image
from fedgraft.common.modalities.text import Text
from fedgraft.common.modalities.video import Video

__all__ = ["MODALITIES", "Modality", "Processor"]

MODALITIES: dict[str, Modality] = {
    "text": Text(),
    "image": Image(),
    "audio": Audio(),
    "video": Video(),
}
