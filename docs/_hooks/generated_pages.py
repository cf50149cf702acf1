"""MkDocs' hook: the pages that are made of the code's own tables, so that they cannot say other than it does."""

from pathlib import Path

from choices_page import choices_page
from commands_page import commands_page
from methods_page import methods_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from options_page import options_page
from refusals_page import refusals_page
from strategies_page import strategies_page

PAGES = {
    "reference/options.md": options_page,
    "reference/methods.md": methods_page,
    "reference/strategies.md": strategies_page,
    "reference/choices.md": choices_page,
    "reference/commands.md": commands_page,
    "reference/refusals.md": refusals_page,
}
"""Where they stand -> what makes them."""
ROOT = Path(__file__).resolve().parents[2]
PICTURES = {"images/frontier.svg": ROOT / "experiments" / "frontier.svg"}
"""Where they stand -> where they are kept."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them to what is read from the folder."""
    for place, page in PAGES.items():
        files.append(File.generated(config, place, content=page()))
    for place, kept in PICTURES.items():
        files.append(File.generated(config, place, abs_src_path=str(kept)))
    return files
