"""Data files of many formats into samples, token ids with a loss mask, and batches."""

from citi.data.chat_template import install_tool_template
from citi.data.collate import Collator
from citi.data.dataset import RenderedDataset, RenderStatistics, Segment, describe_rendered
from citi.data.files import read_data, read_samples
from citi.data.formats import FORMATS, Format, FormatVerdict
from citi.data.mix import mix
from citi.data.render import Rendered, Renderer, render, render_prompt
from citi.data.report import DataReport
from citi.data.sample import GENERAL, TOOL, DataError, Message, Sample

__all__ = [
    "FORMATS",
    "GENERAL",
    "TOOL",
    "Collator",
    "DataError",
    "DataReport",
    "Format",
    "FormatVerdict",
    "Message",
    "RenderStatistics",
    "Rendered",
    "RenderedDataset",
    "Renderer",
    "Sample",
    "Segment",
    "describe_rendered",
    "install_tool_template",
    "mix",
    "read_data",
    "read_samples",
    "render",
    "render_prompt",
]
