"""The docs site and the explorer in a real browser: Debian's Chromium, driven by Playwright.

Without a browser these are skipped on a developer's machine (apt-get install chromium) and fail where CI is set."""
import json, os, re, shutil, subprocess, sys, threading, time, urllib.request
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import torch

root = Path(__file__).resolve().parent.parent
CHROMIUM = next(
    (p for p in map(Path, ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")) if p.exists()),
    None)
FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()
WIDTHS = (1400, 400)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None and os.environ.get("CI") == "true":
        pytest.fail("no Chromium, and CI needs one: apt-get install chromium")
    if CHROMIUM is None: pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    "A page that must end without an error in the console and without having asked any other host."
    page, wrong = browser.new_page(viewport=dict(width=WIDTHS[0], height=1000)), []
    page.on("console", lambda m: m.type == "error" and wrong.append(f"console: {m.text} {m.location.get('url')}"))
    page.on("pageerror", lambda e: wrong.append(f"error: {e}"))
    page.on("request", lambda r: re.match(r"(https?|ws)://127\.0\.0\.1[:/]|data:|blob:|about:", r.url)
                                 or wrong.append(f"request: {r.url}"))
    yield page
    page.close()
    assert not wrong, wrong[:5]


# The docs site

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "The site, built afresh."
    out = tmp_path_factory.mktemp("docs")/"site"
    done = subprocess.run(
        [sys.executable, root/"docs"/"build.py", "--out", out], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def site(folder):
    "Its address."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


class Links(HTMLParser):
    "What a page links to and loads, its anchors, and its images without a text."
    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors, self.untold = [], [], {""}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if "id" in a: self.anchors.add(a["id"])
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag in ("img", "script") and a.get("src"): self.loads.append(a["src"])
        if tag == "link" and a.get("rel") in ("stylesheet", "icon", "preload"): self.loads.append(a["href"])
        if tag == "img" and not a.get("alt"): self.untold.append(a.get("src"))


@pytest.fixture(scope="module")
def pages(folder):
    return {p: Links(p.read_text(encoding="utf-8")) for p in sorted(folder.rglob("*.html")) if "_static" not in p.parts}


def test_links_resolve(folder, pages):
    wrong = []
    for path, found in pages.items():
        for link in found.links + found.loads:
            target, anchor = urldefrag(link)
            if re.match(r"https?:|mailto:|data:", target): continue
            there = (path.parent/unquote(target.split("?")[0])).resolve() if target else path
            if there.is_dir(): there = there/"index.html"
            if not there.is_file() or there in pages and unquote(anchor) not in pages[there].anchors:
                wrong.append(f"{path.relative_to(folder)}: {link}")
    assert len(pages) > 50 and not wrong, wrong[:10]


def test_nothing_is_loaded_from_elsewhere(pages):
    assert not [u for found in pages.values() for u in found.loads if re.match(r"(https?:)?//", u)]


def test_images_have_texts(folder, pages):
    assert not {p.relative_to(folder).as_posix(): o.untold for p, o in pages.items() if o.untold}


def test_every_room_has_a_page(folder):
    nbs = root/"nbs"
    modules = {p.relative_to(nbs).with_suffix("")
               for p in nbs.rglob("*.ipynb") if re.search(r"#\|\s*default_exp", p.read_text(encoding="utf-8"))}
    pages = {p.relative_to(folder/"modules").with_suffix("")
             for p in (folder/"modules").rglob("*.html") if p.stem != "index"}
    assert modules and modules == pages


def test_pages_fit(page, site, folder, pages):
    "No page is wider than the window, be it a desk's or a telephone's."
    wide = []
    for path in pages:
        page.goto(site + path.relative_to(folder).as_posix())
        for width in WIDTHS:
            page.set_viewport_size(dict(width=width, height=900))
            if page.evaluate("document.documentElement.scrollWidth") > width:
                wide.append((path.relative_to(folder).as_posix(), width))
    assert not wide, wide


def test_search_finds_the_model(page, site):
    page.goto(site)
    page.keyboard.press("Control+K")
    page.keyboard.type("AladinModel")
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results li a[href*='modules/model/05_model.html']")


def test_tables_sort(page, site):
    page.goto(site + "results/scenes/index.html")
    table = page.locator("table").first
    place = [h.strip() for h in table.locator("th").all_inner_texts()].index("rsum")
    def column():
        return [float(t.split("±")[0]) for t in table.locator(f"tbody tr td:nth-child({place + 1})").all_inner_texts()]
    before = column()
    button = table.locator("th button").nth(place)
    button.focus()
    page.keyboard.press("Enter")
    assert (column() == sorted(before, reverse=True)
            and table.locator("th").nth(place).get_attribute("aria-sort") == "descending")
    button.click()
    assert column() == sorted(before)


def violations(page, part=None):
    "What axe-core finds wrong."
    from axe_playwright_python.sync_playwright import Axe
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in Axe().run(page, context=part).response["violations"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(browser, site, scheme):
    "axe-core finds nothing: names, alternative texts, contrast, in both colour schemes."
    page = browser.new_page(color_scheme=scheme)
    for path in ("index.html", "explore.html", "modules/training/00_losses.html", "results/scenes/index.html",
                 "reference/index.html"):
        page.goto(site + path)
        assert not violations(page), (path, violations(page))
    page.close()


# The search page

def test_search_page(page, tmp_path):
    """A word that is clicked shows its best region; a region that is clicked shows its words; a phone does not scroll
    sideways."""
    import numpy as np
    from aladin.model.model import Alignment
    from aladin.search.index import Hit
    from aladin.data.pictures import Pictures
    from aladin.search.page import search_page
    boxes = np.array([[.1, .1, .4, .5], [.5, .4, 1, 1]], np.float32)
    alignment = Alignment(
        ["red", "cube", "</script>"], boxes, ["cube", "dog"], np.array([[.8, .9, -.1], [.2, .1, -.3]], np.float32))
    search_page(tmp_path/"page.html",
                [("a red cube", [Hit("1", "1", 1.7, .6, None, alignment), Hit("2", "2", 1.1, .5)])], Pictures(tmp_path))
    page.set_content((tmp_path/"page.html").read_text())
    assert page.locator(".hit").count() == 2 and page.locator(".al-region").count() == 2
    page.click(".al-word[data-word='1']")
    assert page.locator(".al-best").get_attribute("data-region") == "0" and "cosine 0.90" in page.inner_text(".al-says")
    page.click(".al-region[data-region='1']")
    assert "dog is the best region of no word; nearest to it is “red”, cosine 0.20" in page.inner_text(".al-says")
    assert not violations(page, ".al-pair")
    page.set_viewport_size(dict(width=WIDTHS[1], height=800))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


# The page of a service

@pytest.fixture(scope="module")
def service(tmp_path_factory):
    "`aladin serve` over thirty scenes, without torch; its address."
    from served import make_index, Served
    out = make_index(tmp_path_factory.mktemp("service"))
    with Served(out/"index", "--onnx", "--max-k", 24) as running: yield running


def until(page, condition):
    """Wait until a condition holds. Playwright's own `wait_for_function` evaluates text in the page, which the page's
    policy forbids."""
    end = time.monotonic() + 30
    while not page.evaluate(condition): assert time.monotonic() < end and page.wait_for_timeout(30) is None, condition


@pytest.fixture
def open_service(page, service):
    "The page of the service, with the answer to a query; its policy must let everything work that it does."
    page.goto(service.url)
    until(page, "document.querySelector('#about').textContent.includes('30 pictures, 150 captions')")
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.type("a red fish above a green cactus")
    page.keyboard.press("Enter")
    page.wait_for_selector("#chosen:not([hidden]) .al-region")
    until(page, "document.querySelectorAll('.al-hit img').length === 12")
    return page


def test_service_page_by_keyboard(open_service, service):
    "A query, a picture, a word: with the keyboard alone, and what lights up is what /pair says."
    page, text = open_service, "a red fish above a green cactus"
    found = [h["id"] for h in service.hits(text=text, k=12)]
    assert [b.get_attribute("data-image") for b in page.locator(".al-hit").all()] == found
    assert (page.locator(".al-hit[aria-pressed=true]").get_attribute("data-image") == found[0]
            and "12 pictures for" in page.inner_text("#status"))
    for _ in range(8):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "al-hit": break
    for key in ("ArrowRight", "ArrowRight", "End", "Home", "ArrowRight", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#chosen[data-image='{found[1]}']")
    assert page.locator(".al-hit[aria-pressed=true]").get_attribute("data-image") == found[1]
    pair = service.ask("/pair", dict(text=text, image=found[1]))[2]
    assert (f"alignment score {pair['score']:.2f}" in page.inner_text(".al-sum")
            and page.locator(".al-region").count() == len(pair["regions"]))
    assert "blob:" in page.evaluate("getComputedStyle(document.querySelector('.al-picture')).backgroundImage")
    # the picture shows through
    assert page.evaluate("getComputedStyle(document.querySelector('.al-region')).backgroundColor") == "rgba(0, 0, 0, 0)"
    page.locator(".al-word[data-word='2']").focus()
    page.keyboard.press("Space")
    word = pair["words"][2]
    assert page.locator(".al-best").get_attribute("data-region") == str(word["region"])
    assert f"“{word['text']}” points at {pair['regions'][word['region']]['tag']}" in page.inner_text(".al-says")


def test_service_page_captions_and_similar(open_service, service):
    page = open_service
    image = page.locator("#chosen").get_attribute("data-image")
    captions = [h["text"] for h in service.hits("/captions", image=image, k=5)]
    assert page.locator(".al-caption").all_inner_texts() == captions
    page.locator(".al-caption").first.click()
    until(page, f"document.querySelector('#query').value === {json.dumps(captions[0])}")
    until(page, f"document.querySelector('#status').textContent.includes({json.dumps(captions[0])})")
    page.wait_for_selector("#chosen:not([hidden])")
    image = page.locator("#chosen").get_attribute("data-image")
    page.click("#like")
    until(page, f"document.querySelector('#status').textContent.includes('like picture {image}')")
    assert ([b.get_attribute("data-image") for b in page.locator(".al-hit").all()]
            == [h["id"] for h in service.hits(image=image, k=12)])
    page.fill("#query", "a tree")
    page.select_option("#rerank", "matching")
    page.select_option("#count", "24")
    page.press("#query", "Enter")
    until(page, "document.querySelector('#status').textContent.startsWith('24 pictures for “a tree”')")
    assert ([b.get_attribute("data-image") for b in page.locator(".al-hit").all()]
            == [h["id"] for h in service.hits(text="a tree", k=24, rerank=0)])
    assert page.locator("#count option").count() == 2  # no more than the service allows


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_service_page_fits_and_is_accessible(open_service, scheme):
    "axe-core finds nothing in either colour scheme, and a telephone does not scroll sideways."
    page = open_service
    page.emulate_media(color_scheme=scheme)
    dark = [int(v) < 60
            for v in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]]
    assert dark == [scheme == "dark"]*3
    page.locator(".al-word").first.click()
    for width in WIDTHS:
        page.set_viewport_size(dict(width=width, height=900))
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), width
        assert not violations(page), (width, violations(page))


def test_service_page_asks_for_the_token(browser, service):
    "Without the token the page has nothing to show; with it everything, the pictures too."
    from served import Served
    with Served(service.folder, "--onnx", ALADIN_SERVE_TOKEN="s3cret") as closed:
        page = browser.new_page()
        page.goto(closed.url)
        page.fill("#query", "a tree")
        page.press("#query", "Enter")
        page.wait_for_selector("#token-form:not([hidden])")
        assert ("token: expected the token of the service, found none" in page.inner_text("#problem")
                and not page.locator(".al-hit").count())
        assert not violations(page)
        page.keyboard.type("s3cret")
        page.keyboard.press("Enter")
        until(page, "document.querySelectorAll('.al-hit img').length === 12")
        assert page.locator("#problem").is_hidden() and page.locator("#token-form").is_hidden()
        page.close()


# The explorer

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run folder with an untrained model, beside its scenes."
    from aladin.data.text import load_tokenizer
    from aladin.runs.stages import prepare_data
    from aladin.model.configuration import AladinConfig
    from aladin.model.model import AladinModel, save_model
    from small_inputs import with_processor
    from aladin.data.scenes import write_scenes
    out = tmp_path_factory.mktemp("explorer")
    write_scenes(out/"scenes", train=4, minival=4, test=30, progress=False)
    prepare_data(out/"scenes", out/"data", progress=False)
    torch.manual_seed(0)
    model = AladinModel(AladinConfig(
        vocab_size=len(load_tokenizer(out/"data")), hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, region_dim=70, max_tokens=40, max_regions=20, drop_last_word=False))
    save_model(with_processor(model, out/"data"), out/"some-configuration"/"seed-1"/"model")
    return out/"some-configuration"/"seed-1"


@pytest.fixture(scope="module")
def lab(run, tmp_path_factory):
    """JupyterLab over the explorer and the start page, the former's parameters naming the run; no news, no question for
    a kernel."""
    out = tmp_path_factory.mktemp("lab")
    shutil.copytree(root/"nbs"/"images", out/"nbs"/"images")
    shutil.copy(root/"nbs"/"start.ipynb", out/"nbs")
    notebook = json.loads((root/"nbs"/"explore.ipynb").read_text())
    parameters = next(c for c in notebook["cells"] if "parameters" in c["metadata"].get("tags", []))
    parameters["source"] = [f"run, data, pictures, split = {str(run)!r}, None, None, 'test'"]
    (out/"nbs"/"explore.ipynb").write_text(json.dumps(notebook))
    for plugin, settings in {"docmanager-extension/plugin": dict(autoStartDefaultKernel=True),
                             "apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False)}.items():
        path = out/"settings"/"@jupyterlab"/f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    folders = dict(JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="workspaces",
                   JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="runtime")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
               "--ServerApp.port=0", "--IdentityProvider.token=", f"--notebook-dir={out/'nbs'}"]
    with open(out/"log", "w") as log:
        server = subprocess.Popen(
            command, env=os.environ | {k: str(out/v) for k, v in folders.items()} | dict(OMP_NUM_THREADS="1"),
            stdout=log, stderr=subprocess.STDOUT)
    yield wait_for_address(out/"log", server)
    server.terminate()
    server.wait()


def wait_for_address(log, server):
    "The address in JupyterLab's log, once it answers."
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        if found := re.search(r"(http://127\.0\.0\.1:\d+)/lab", log.read_text()):
            try: urllib.request.urlopen(found[1] + "/api").close()
            except OSError: pass
            else: return found[1]
        time.sleep(.25)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")


def test_explorer(page, lab, run):
    """Opened, all cells run, a caption typed, a word and a region clicked: what lights up is what the alignment head
    says."""
    from aladin.data.splits import open_split
    from aladin.model.model import load_model
    from aladin.view.plots import attend
    page.goto(f"{lab}/lab/tree/explore.ipynb")
    page.wait_for_function(
        "document.querySelector('#jp-main-statusbar')?.textContent.includes('| Idle')", timeout=120_000)
    page.click('.lm-MenuBar-itemLabel:text-is("Run")')
    page.click('li[data-command="runmenu:run-all"]')
    page.wait_for_selector(".al-query", timeout=120_000)
    page.wait_for_selector(".jp-OutputArea:has-text('two-stage  ')", timeout=60_000)  # the last cell's output
    assert not page.locator('[data-mime-type="application/vnd.jupyter.error"]').count()

    model = load_model(run/"model")
    data = open_split(run.parents[1]/"data", "test", model.processor)
    caption = 42
    image = int(data.caption_image[caption])
    page.fill(".al-query", data.captions[caption])
    page.press(".al-query", "Enter")
    page.wait_for_selector(".al-head[data-head='two-stage'] .al-hit")
    assert page.locator(".al-head h2").all_inner_texts() and page.locator(".al-head").count() == 3

    best = page.locator(".al-head[data-head=alignment] .al-hit").first.get_attribute("data-image")
    shown = attend(model, data, data.image_ids.index(best), caption)
    assert ([t.split("\n")[0] for t in page.locator(".al-word").all_inner_texts()]
            == [w.removeprefix("##") for w in shown.words])
    assert page.locator(".al-region").count() == len(shown.boxes)
    assert f"alignment score {shown.score:.2f}" in page.inner_text(".al-sum")
    # words whose best region is no matter of rounding
    ranked = -torch.from_numpy(shown.cosines).sort(0, descending=True).values
    clear = [w for w in range(len(shown.words)) if ranked[1, w] - ranked[0, w] > .01]
    for word in clear[:3]:
        page.click(f".al-word[data-word='{word}']")
        region = int(shown.cosines[:, word].argmax())
        assert page.locator(".al-best").get_attribute("data-region") == str(region)
        assert f"cosine {shown.cosines[region, word]:.2f}" in page.inner_text(".al-says")
    page.locator(f".al-region[data-region='{region}']").focus()
    page.keyboard.press("Space")
    lit = {int(w.get_attribute("data-word")) for w in page.locator(".al-word.al-lit").all()}
    assert {w for w in clear if shown.cosines[:, w].argmax() == region} <= lit

    assert not violations(page, ".al-explorer")

    page.locator(".al-caption").first.click()
    page.wait_for_function(f"document.querySelector('.al-query').value !== {json.dumps(data.captions[caption])}")
    page.fill(".al-query", data.captions[caption])
    page.press(".al-query", "Enter")
    page.wait_for_selector(".al-hit small:has-text('✓')")
    assert page.locator(f".al-hit[data-image='{data.image_ids[image]}'] small:has-text('✓')").count()


def test_start_page(page, lab):
    page.goto(f"{lab}/lab/tree/start.ipynb")
    page.click(".jp-RenderedMarkdown a:text-is('Explore')", timeout=60_000)
    page.wait_for_selector(".lm-TabBar-tab:has-text('explore.ipynb')")
