"""Sphinx's configuration of the book: `make site` builds it from notebooks and outputs as they are committed."""
from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tools"))

from notebooks import address, settings  # noqa: E402 - tools/ is no package

INI = settings()
OWNER, REPOSITORY, _, BRANCH = address().split("/")
GITHUB = f"https://github.com/{OWNER}/{REPOSITORY}"

project, author, release = INI["title"], INI["author"], INI["version"]
project_copyright = INI["copyright"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]

# Addresses are those of the repository, and so its relative links work in the book too.
root_doc = "README"
include_patterns = ["*.md", "results/**", "nbs/**", "site/**"]
exclude_patterns = [".*", "build", "data", "data_scripts", "qtseg", "runs", "tests", "tools",
                    "**/.ipynb_checkpoints", "nbs/index.ipynb", "site/contents.md", "site/templates"]

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

templates_path = [str(HERE / "templates")]
default_role = "code"
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 100

html_theme = "sphinx_book_theme"
html_title = project
html_copy_source = False
html_static_path = html_css_files = ["book.css"]
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system
html_theme_options = {"repository_url": GITHUB, "repository_branch": BRANCH, "use_repository_button": True,
                      "use_download_button": False, "navbar_persistent": [], "show_navbar_depth": 1}


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """The front page is rendered from a notebook; the book's table of contents goes below it."""
    if docname == root_doc:
        source[0] += (HERE / "contents.md").read_text(encoding="utf-8")


def link_folders(app: Sphinx, tree: nodes.document) -> None:
    """Links to folders: that of the reference notebooks has a page in the book, others are shown on GitHub."""
    for node in [node for node in tree.findall(addnodes.pending_xref) if node["reftype"] == "myst"]:
        folder = (ROOT / node["refdoc"]).parent.joinpath(node["reftarget"]).resolve()
        if folder == ROOT / "nbs" / "reference":
            page = {"refdomain": "std", "reftype": "doc", "reftarget": "/site/reference", "refexplicit": True}
            node.replace_self(addnodes.pending_xref("", *node.children, refdoc=node["refdoc"], **page))
        elif folder.is_dir():
            where = f"{GITHUB}/tree/{BRANCH}/{folder.relative_to(ROOT).as_posix()}"
            node.replace_self(nodes.reference("", "", *node.children, refuri=where))


def shorten_signature(app: Sphinx, what: str, name: str, obj: object, *_) -> tuple[str, str] | None:
    """pydantic's types of all keys fill a page; a reference notebook lists the keys."""
    return ("(**keys)", "") if what == "class" and hasattr(obj, "model_fields") else None


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
    app.connect("doctree-read", link_folders)
    app.connect("autodoc-process-signature", shorten_signature)
