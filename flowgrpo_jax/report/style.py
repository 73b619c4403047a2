"""The stylesheet of report.html: light and dark, phone to desktop."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2230; --soft: #667085; --line: #e4e7ec;
  --c1: #2f6bff; --c2: #e07b16; --good: #127a46; --bad: #b3372b; --track: #eceff4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f131a; --card: #181d27; --ink: #e6e9ef; --soft: #98a2b3; --line: #2a3140;
    --c1: #7ba4ff; --c2: #f0a553; --good: #57c78d; --bad: #f0877c; --track: #262d3a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
    "DejaVu Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 20px 64px; }
header { margin-bottom: 28px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 6px; }
h2 { font-size: 18px; letter-spacing: -.01em; margin: 40px 0 14px; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
p { margin: 0 0 8px; }
.soft, .note, footer { color: var(--soft); }
.note { font-size: 12.5px; margin: 1px 0 0; }
pre, code, .config { font-family: ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; font-size: 12.5px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; margin: 14px 0 0; white-space: pre-wrap;
  overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 14px; }
.card, .chart, .table, .sheet figure, details {
  background: var(--card); border: 1px solid var(--line); border-radius: 14px; }
.card { padding: 16px 18px; flex: 1 1 238px; }
.card .name { color: var(--soft); font-size: 13px; }
.card .value { font-size: 25px; font-weight: 650; letter-spacing: -.02em;
  line-height: 1.25; font-variant-numeric: tabular-nums; white-space: nowrap; }
.card .value .from { color: var(--soft); font-weight: 450; }
.card .more { font-size: 13px; color: var(--soft); }
.up { color: var(--good); } .down { color: var(--bad); }
.table { overflow-x: auto; padding: 6px 4px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 14px; text-align: right; white-space: nowrap; }
th { font-size: 12.5px; font-weight: 600; color: var(--soft); }
th:first-child, td:first-child { text-align: left; }
thead tr:first-child th[colspan] { text-align: center; color: var(--ink); }
tbody tr { border-top: 1px solid var(--line); }
tr.total td { font-weight: 650; }
td.bar { width: 22%; min-width: 120px; }
.track { position: relative; height: 8px; border-radius: 4px; background: var(--track);
  overflow: hidden; }
.track i { position: absolute; inset: 0 auto 0 0; border-radius: 4px; }
.track .after { background: var(--c1); }
.track .before { background: var(--ink); opacity: .38; }
.charts { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); }
.chart { margin: 0; padding: 14px 16px 8px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12.5px;
  color: var(--soft); margin: 3px 0 6px; }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.key i { display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin-right: 6px; vertical-align: 3px; }
i.c1 { background: var(--c1); } i.c2 { background: var(--c2); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
svg .raw { fill: none; stroke-width: 1; opacity: .28; }
svg polyline.c1 { stroke: var(--c1); } svg polyline.c2 { stroke: var(--c2); }
svg circle.c1 { fill: var(--c1); } svg circle.c2 { fill: var(--c2); }
.sheet { display: grid; gap: 14px; margin-bottom: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 160px), 1fr)); }
.sheet.pair { grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.sheet figure { margin: 0; padding: 10px; }
.sheet img { display: block; width: 100%; border-radius: 6px; background: #fff; }
.sheet.pixels img { image-rendering: pixelated; }
.sheet figcaption { font-size: 13px; padding: 8px 2px 0; display: flex; gap: 0 10px;
  flex-wrap: wrap; justify-content: space-between; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
details { padding: 12px 16px; margin-top: 14px; }
summary { cursor: pointer; font-weight: 600; font-size: 14px; }
details > .charts { margin: 14px 0 4px; }
details .chart { border-color: var(--line); }
.config { columns: 2 360px; column-gap: 32px; margin-top: 12px; }
.config div { display: flex; justify-content: space-between; gap: 14px; padding: 3px 0;
  border-bottom: 1px solid var(--line); break-inside: avoid; }
.config span:last-child { text-align: right; overflow-wrap: anywhere; }
footer { font-size: 12.5px; margin-top: 40px; }
@media (max-width: 560px) {
  main { padding: 24px 14px 48px; } h1 { font-size: 23px; }
  .cards { gap: 10px; }
  .card { padding: 12px 14px; flex-basis: calc(50% - 10px); } .card .value { font-size: 17px; }
  th, td { padding: 7px 9px; } .bar { display: none; }
}
"""
