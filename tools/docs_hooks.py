"""For mkdocs: files of the repository that pages link to become pages of the site, sources highlighted, data as it is.

So the same links lead somewhere in a checkout and in the site, and no page names the place of a repository. A page that
fetches something from elsewhere is an error.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS, COPIES = "docs", "repository"
LANGUAGES = {".py": "python", ".sh": "bash", ".cc": "cpp", ".h": "cpp", ".toml": "toml", "": "text"}
FETCHED = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")


@event_priority(100)  # before the plugin that checks links looks at the files
def on_files(files: Files, *, config) -> Files:
    """Adds what is linked to from the pages, and from what is added."""
    pages = [f"{DOCS}/{file.src_uri}" for file in files.documentation_pages()]
    for page in pages:
        for target in linked(page):
            if files.get_file_from_path(uri(target)) is None:
                files.append(File.generated(config, uri(target), **source(target)))
                pages += [target] * target.endswith(".md")
    return files


def on_page_markdown(markdown: str, *, page, **_) -> str:
    """Turns links to files of the repository into links to their copies in the site."""
    here = page.file.src_uri

    def moved(match: re.Match) -> str:
        target = resolved(path_of(here), match[2])
        if is_outside(target):
            return match[1] + posixpath.relpath(uri(target), posixpath.dirname(here) or ".") + match[3]
        if here.startswith(f"{COPIES}/"):
            return match[1] + posixpath.relpath(target.removeprefix(f"{DOCS}/"), posixpath.dirname(here)) + match[3]
        return match[0]

    return LINK.sub(moved, markdown)


def on_post_page(output: str, *, page, **_) -> str:
    """Raises PluginError for a page that does not work without a network."""
    if found := FETCHED.findall(output):
        raise PluginError(f"{page.file.src_uri} fetches {', '.join(found)}: the site is to be read from a disk.")
    return output


def linked(page: str) -> list[str]:
    """Files outside the documentation that a page of the repository links to."""
    targets = (resolved(page, match[2]) for match in LINK.finditer((ROOT / page).read_text()))
    return [target for target in targets if is_outside(target) and (ROOT / target).is_file()]


def source(target: str) -> dict:
    """What `File.generated` needs: the file itself, or a page that shows it."""
    path = ROOT / target
    if path.suffix not in LANGUAGES:
        return {"abs_src_path": str(path)}
    return {"content": f"# {target}\n\n~~~~{LANGUAGES[path.suffix]}\n{path.read_text()}\n~~~~\n"}


def uri(target: str) -> str:
    """Where the site has a file of the repository."""
    return f"{COPIES}/{target}" + ".md" * (Path(target).suffix in LANGUAGES)


def path_of(uri: str) -> str:
    """The place in the repository of a page of the site."""
    return uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else f"{DOCS}/{uri}"


def resolved(page: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def is_outside(target: str) -> bool:
    return not target.startswith(f"{DOCS}/")
