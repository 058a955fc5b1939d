"""The style sheet of a report."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --page: #ffffff; --panel: #f6f8fa;
  --good: #0b6e4f; --open: #9a5b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #30363d; --page: #0d1117; --panel: #161b22; --good: #3fb98a; --open: #e3a243; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1.25rem 3rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.4rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin: 1.2rem 0 .4rem; font-size: 1.05rem; }
p { margin: .6rem 0; max-width: 48rem; }
.kicker { margin: 0; color: var(--soft); font-size: .85rem; letter-spacing: .08em; text-transform: uppercase; }
.state { font-weight: 600; }
.good { color: var(--good); }
.open { color: var(--open); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin-top: 1.2rem; }
.tiles > div { padding: .7rem .9rem; border: 1px solid var(--line); border-radius: .5rem; background: var(--panel); }
.tiles span { display: block; color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
.tiles strong { display: block; font-size: 1.35rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .35rem 1.2rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
code { font: .88em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
dd code { padding: .05rem .3rem; border-radius: .25rem; background: var(--panel);
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.wide { overflow-x: auto; margin: .8rem 0; }
.wide:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { padding: .2rem 0 .4rem; text-align: left; font-weight: 600; }
th, td { padding: .28rem .8rem .28rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; white-space: nowrap; }
td:last-child:not(.number) { min-width: 9rem; padding-right: 0; white-space: normal; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 400; }
.number { text-align: right; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
details caption { display: none; }
figure { margin: 1rem 0; }
figcaption { color: var(--soft); font-size: .88rem; }
.picture { display: block; width: 100%; min-width: 36rem; height: auto; font-family: inherit; }
.picture * { stroke-linejoin: round; stroke-linecap: butt; }
.picture [id*="cell-"] path, .picture [id*="heat-patch_"] path { shape-rendering: crispEdges; }
ul { margin: .4rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  h1 { font-size: 1.5rem; }
  tbody th { min-width: 8rem; white-space: normal; overflow-wrap: anywhere; }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --page: #fff; --panel: #fff; --good: #0b6e4f; --open: #9a5b00; }
  main { max-width: none; padding: 0; }
  .wide { overflow: visible; }
  .picture { min-width: 0; }
  figure, tr, .tiles > div { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; }
}
"""
