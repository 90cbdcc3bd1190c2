"Sphinx's settings; `.ci/docs.py` adds the title, the author and the address."
import ziamath
from docutils import nodes

extensions = ['myst_nb']
nb_execution_mode, nb_merge_streams, nb_ipywidgets_js = 'off', True, {}
nb_code_prompt_show = nb_code_prompt_hide = 'Source'
myst_enable_extensions, myst_heading_anchors = ['attrs_block', 'colon_fence', 'dollarmath', 'fieldlist'], 3
add_module_names, python_use_unqualified_type_names, python_maximum_signature_line_length = False, True, 80
toc_object_entries_show_parents = 'hide'
suppress_warnings = ['misc.highlighting_failure', 'mystnb.unknown_mime_type']

html_theme, html_copy_source, html_show_sphinx = 'furo', False, False
html_static_path, html_css_files, html_js_files = ['_static'], ['site.css'], ['site.js']
html_theme_options = {'top_of_page_buttons': []}
pygments_style, pygments_dark_style = 'friendly', 'monokai'
html_math_renderer = 'drawn'
ziamath.config.svg2 = False  # glyphs as paths, without ids that formulas would repeat


def formula(self, node):
    "A formula as a drawing, which needs no script and no font."
    block, tex = isinstance(node, nodes.math_block), node.astext()
    drawn = ziamath.Latex(tex, size=18 if block else 16.5, color='currentColor', inline=not block)
    style = 'max-width: 100%' if block else f'vertical-align: {drawn.getyofst():.2f}px'
    svg = drawn.svg().replace('<svg ', f'<svg role="img" aria-label="{self.attval(tex)}" style="{style}" ', 1)
    self.body.append(f'<div class="formula">{svg}</div>' if block else svg)
    raise nodes.SkipNode


def setup(app): app.add_html_math_renderer('drawn', (formula, None), (formula, None))
