"""Copy the plots of benchmarks/results/ into the site's results/, and point the pages to them."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
IN_REPOSITORY, ON_SITE = "../benchmarks/results/", "results/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted([*RESULTS.glob("*.svg"), *RESULTS.glob("*.png")]):
        files.append(File.generated(config, ON_SITE + path.name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace(f"({IN_REPOSITORY}", f"({ON_SITE}")
