"""What the page is made of: files with headers that let it do little, libraries that are what was published, not much of it."""

import gzip
import hashlib
import re
from importlib.resources import files
from pathlib import Path

import httpx
import pytest

from keural.serve.server.keys import Keys
from keural.serve.server.page import ADDRESSES
from keural.tokenizer import KeuralTokenizer
from tests.helpers.serving import Writing, service_of, serving

WEB = Path(str(files("keural.serve"))) / "web"
VENDOR = WEB / "vendor"
LARGEST = 150 * 1024
POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "frame-ancestors 'none'",
    "base-uri 'none'",
    "form-action 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
}
IMPORTED = re.compile(r"""(?:from|import)\s+["'](\./[^"']+)["']""")
OWN = sorted(path for path in WEB.rglob("*") if path.is_file() and VENDOR not in path.parents)


@pytest.fixture
def client(tokenizer: KeuralTokenizer):  # type: ignore[no-untyped-def]
    with serving(service_of(tokenizer, Writing(tokenizer, "hello"))) as client:
        yield client


class TestEveryFile:
    def test_comes_with_its_type_and_the_policy(self, client: httpx.Client) -> None:
        for address, name in ADDRESSES.items():
            response = client.get(address)
            assert response.status_code == 200
            assert response.content == (WEB / name).read_bytes()
            kind = {"html": "text/html", "css": "text/css", "js": "text/javascript"}[name.rpartition(".")[2]]
            assert response.headers["content-type"] == f"{kind}; charset=utf-8"
            assert response.headers["x-content-type-options"] == "nosniff"
            assert set(response.headers["content-security-policy"].split("; ")) == POLICY

    def test_is_sent_once(self, client: httpx.Client) -> None:
        first = client.get("/web/app.js")
        again = client.get("/web/app.js", headers={"If-None-Match": f'"other", {first.headers["etag"]}'})
        changed = client.get("/web/app.js", headers={"If-None-Match": '"other"'})

        assert (again.status_code, again.content, changed.status_code) == (304, b"", 200)

    def test_answers_to_head(self, client: httpx.Client) -> None:
        response = client.head("/")

        assert (response.status_code, response.content) == (200, b"")
        assert int(response.headers["content-length"]) == len((WEB / "index.html").read_bytes())

    @pytest.mark.parametrize(
        "address", ["/web/", "/web/vendor/SHA256SUMS", "/web/../service.py", "/web/%2e%2e/service.py", "/web//etc/passwd"]
    )
    def test_is_on_the_list_or_is_not_there(self, client: httpx.Client, address: str) -> None:
        assert client.get(address).status_code == 404

    def test_is_on_the_list(self) -> None:
        listed = {WEB / name for name in ADDRESSES.values()}
        beside = {VENDOR / "SHA256SUMS", *(VENDOR / "licences").iterdir()}

        assert {path for path in WEB.rglob("*") if path.is_file()} == listed | beside

    def test_imports_what_is_on_the_list(self) -> None:
        for path in OWN:
            for name in IMPORTED.findall(path.read_text()):
                assert (path.parent / name).resolve().relative_to(WEB).as_posix() in ADDRESSES.values()

    def test_needs_no_key_where_the_model_does(self, tokenizer: KeuralTokenizer) -> None:
        with serving(service_of(tokenizer, Writing(tokenizer, "hello"), keys=Keys(["secret"]))) as client:
            assert all(client.get(address).status_code == 200 for address in ADDRESSES)
            assert client.get("/v1/models").status_code == 401
            assert client.get("/web/other.js").status_code == 401

    def test_is_not_for_strangers_by_name(self, tokenizer: KeuralTokenizer) -> None:
        with serving(service_of(tokenizer, Writing(tokenizer, "hello"), hosts=frozenset({"localhost", "127.0.0.1"}))) as client:
            assert client.get("/", headers={"Host": "elsewhere.example"}).status_code == 403


class TestTheVendoredLibraries:
    def test_are_what_was_published(self) -> None:
        sums = dict(reversed(line.split()) for line in (VENDOR / "SHA256SUMS").read_text().splitlines())
        there = {path.relative_to(VENDOR).as_posix() for path in VENDOR.rglob("*") if path.is_file()} - {"SHA256SUMS"}

        assert sums.keys() == there
        for name, expected in sums.items():
            assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == expected, name

    def test_come_with_their_licences(self) -> None:
        assert "MarkedJS" in (VENDOR / "licences/marked.txt").read_text()
        assert "Redistribution and use" in (VENDOR / "licences/highlight.js.txt").read_text()


class TestThePagesOwnCode:
    def test_names_no_other_site(self) -> None:
        namespaces = {"http://www.w3.org/2000/svg"}
        for path in OWN:
            assert set(re.findall(r"https?://[^\s\"'`)]+", path.read_text())) <= namespaces, path.name

    def test_makes_no_markup_of_strings(self) -> None:
        sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|srcdoc|setHTML"
        for path in OWN:
            assert not re.search(sinks, path.read_text()), path.name

    def test_has_no_styles_or_scripts_inside_the_document(self) -> None:
        page = (WEB / "index.html").read_text()

        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]* src=)", page)

    def test_says_everything_in_both_languages(self) -> None:
        english, korean = (WEB / "words.js").read_text().split("\n  ko: {")
        names = [re.findall(r"(?:^|[\s,{])(\w+): \"", part) for part in (english, korean)]

        assert sorted(names[0]) == sorted(names[1])
        assert len(names[0]) > 50
        used = {
            name
            for path in OWN
            for name in re.findall(r"data-(?:words|label|hint|placeholder)=\"(\w+)\"|say\(\"(\w+)\"", path.read_text())
        }
        assert {one or other for one, other in used} <= set(names[0])


def test_the_page_is_small() -> None:
    assert sum(len(gzip.compress((WEB / name).read_bytes(), 9)) for name in ADDRESSES.values()) <= LARGEST
