"""The frame of a page: its style, for screens wide and narrow, light and dark, and for paper."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark;
        --ink: #1f2328; --soft: #5c636b; --line: #d8dce0; --paper: #fff; --card: #f6f7f9;
        --good: #1a7f4b; --bad: #a85400; --badbg: #fff3df; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a6abb1; --line: #3c4046; --paper: #17191c; --card: #202328;
          --good: #57c98a; --bad: #f0b25c; --badbg: #3a2d14; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; color: var(--ink);
       background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
header, p, ul, .numbers, .behind { max-width: 48rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .5rem 0; }
.soft, figcaption, thead th { color: var(--soft); font-size: .9rem; }
.verdict { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
           padding: .4rem 1rem .7rem; max-width: 48rem; margin: 1.2rem 0; }
.verdict h2 { margin: .5rem 0 0; }
.headline { font-size: 1.35rem; line-height: 1.35; margin: .2rem 0 .6rem; }
.verdict ul { list-style: none; margin: 0; padding: 0; }
.verdict li { margin: .45rem 0; padding-left: 1.5rem; text-indent: -1.5rem; }
.mark { display: inline-block; width: 1.5rem; text-indent: 0; font-weight: 700; }
.good .mark { color: var(--good); }
.verdict .flat li { padding: 0; text-indent: 0; }
.note { background: var(--badbg); border-radius: .3rem; padding: .5rem .8rem; }
.bad { background: var(--badbg); border-radius: .3rem; }
.verdict li.bad { padding: .35rem .5rem .35rem 1.9rem; }
.bad .mark { color: var(--bad); }
table { border-collapse: collapse; width: 100%; margin: .8rem 0 1.4rem; }
th, td { text-align: left; vertical-align: baseline; padding: .3rem 1rem .3rem 0;
         border-bottom: 1px solid var(--line); }
th { font-weight: 500; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.columns th { width: 40%; }
.numbers td, .numbers th + th { text-align: right; padding: .3rem 0 .3rem .6rem; }
.numbers td { white-space: nowrap; }
.numbers thead th + th { width: 17%; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll .numbers { max-width: none; width: auto; min-width: min(48rem, 100%); }
.scroll .numbers td, .scroll .numbers th + th { padding-left: .8rem; white-space: normal;
                                                min-width: 6.2rem; }
.columns { columns: 2 24rem; column-gap: 3rem; }
.columns > * { display: inline-block; width: 100%; margin: 0 0 1.4rem; break-inside: avoid; }
.columns h2, .columns h3 { margin-top: .6rem; }
.figures { display: grid; gap: 1rem 2.5rem; align-items: start; margin: .6rem 0;
           grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
figure { margin: 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .3rem; }
figcaption { margin-top: .35rem; max-width: 40rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem; background: var(--card);
      border: 1px solid var(--line); border-radius: .3rem; font-size: .9rem; }
@media (min-width: 56rem) { .tall > :first-child:nth-last-child(3) { grid-row: span 2; } }
@media (max-width: 30rem) { .numbers { font-size: .82rem; } .headline { font-size: 1.15rem; } }
@page { margin: 15mm; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --card: #fff; --badbg: #fff;
          --good: #000; --bad: #000; }
  body { padding: 0; max-width: none; font-size: 9.5pt; }
  .columns { columns: 2; column-gap: 1.5rem; }
  .figures { grid-template-columns: 1fr 1fr; gap: .8rem 1.5rem; }
  h2, h3 { break-after: avoid; }
  tr, pre, li, figure { break-inside: avoid; }
  .bad, .note { border: 1px solid #000; }
}
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A page that refers to nothing outside itself and runs no script.

    Args:
        title: Its title, as text.
        parts: Its parts, as HTML.
    """
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, parts)))
