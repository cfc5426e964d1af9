"Sphinx's settings; `make docs` calls docs/build.py, which stages the pages and then calls Sphinx on them."
from latex2mathml.converter import convert
from docutils import nodes

project, author, copyright = "aladin", "The aladin developers", "2026 onwards, The aladin developers"
extensions = ["myst_nb", "sphinx_copybutton"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_code_prompt_show = "Show the source"
nb_code_prompt_hide = "Hide the source"
nb_output_stderr = "remove"
nb_mime_priority_overrides = [("html", "text/markdown", 5)]
myst_enable_extensions = ["dollarmath", "attrs_block", "attrs_inline"]
myst_heading_anchors = 4
html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = "aladin"
html_favicon = "static/favicon.svg"
html_context = dict(default_mode="auto")
html_static_path = ["static"]  # and what docs/build.py makes
html_css_files = ["pair.css", "aladin.css"]
html_js_files = ["aladin.js"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = dict(
    logo=dict(text="aladin"), show_nav_level=1, navigation_depth=3, collapse_navigation=True, show_toc_level=1,
    back_to_top_button=False, header_links_before_dropdown=7, navbar_align="left", navbar_persistent=[],
    navbar_end=["search-button", "theme-switcher"],
    secondary_sidebar_items={p: ["page-toc"] for p in (
        "guide", "modules/*", "modules/*/*", "tutorials/*", "experiments/*", "reference/*")},
    footer_start=["copyright"], footer_end=[],
    pygments_light_style="a11y-high-contrast-light", pygments_dark_style="a11y-high-contrast-dark")
html_sidebars = {"index": [], "guide": [], "explore": []}
copybutton_exclude = ".linenos, .gp, .go"


def _mathml(display):
    "Formulas as MathML, which browsers draw themselves: no script from elsewhere."
    def visit(self, node):
        self.body.append(convert(node.astext(), display=display))
        raise nodes.SkipNode
    return visit


def _home_scripts(app, page, template, context, tree):
    if page == "index": app.add_js_file("pairs.js"), app.add_js_file("home.js")


def setup(app):
    app.add_html_math_renderer("mathml", (_mathml("inline"), None), (_mathml("block"), None))
    app.connect("html-page-context", _home_scripts)
