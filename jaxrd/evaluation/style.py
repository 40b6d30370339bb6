"""What a report looks like on a screen, on a phone and on paper, and the script that sorts its tables."""

CSS = """
:root { color-scheme: light dark;
  --page: #fafaf8; --card: #fff; --ink: #1f2429; --soft: #626b74; --line: #e2e5e8; --best: #e8f1f8; --focus: #0072b2;
  --flag: #a83412; --flagged: #fdf1ea; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #15181b; --card: #1c2024; --ink: #e4e7ea; --soft: #9aa4ad; --line: #32383e; --best: #20384a; --focus: #56b4e9;
    --flag: #ff9d75; --flagged: #33221b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 -apple-system, "Segoe UI", Inter, Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 56px 28px 72px; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em; margin: 0 0 14px; }
h1, h2, h3, p, dt, dd, li, summary, figcaption, footer { overflow-wrap: anywhere; }
h2 { font-size: 1.22rem; font-weight: 650; letter-spacing: -0.005em; margin: 52px 0 14px; }
h3 { font-size: 1rem; font-weight: 650; margin: 28px 0 10px; }
p.lead { max-width: 46em; margin: 0; font-size: 1.06rem; }
p.note, figcaption { color: var(--soft); font-size: 0.875rem; max-width: 56em; margin: 10px 0 0; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; font-size: 0.9em; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: 0.9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 12px; white-space: nowrap; text-align: right; }
th.text, td.text { text-align: left; }
th { vertical-align: bottom; font-weight: 500; font-size: 0.8125rem; color: var(--soft); border-bottom: 1px solid var(--line); }
tbody tr + tr td { border-top: 1px solid var(--line); }
th button { all: unset; position: relative; cursor: pointer; border-radius: 2px; }
th button:hover, th[aria-sort] button { color: var(--ink); }
th button:focus-visible { outline: 2px solid var(--focus); outline-offset: 3px; }
th button::after { position: absolute; bottom: 0.15em; left: 100%; padding-left: 3px; font-size: 0.5rem; }
th[aria-sort="ascending"] button::after { content: "▲" / ""; }
th[aria-sort="descending"] button::after { content: "▼" / ""; }
abbr { text-decoration: underline dotted var(--line); text-underline-offset: 4px; cursor: help; }
.sd { color: var(--soft); font-weight: 400; font-size: 0.875em; }
.wrap { display: inline-block; white-space: normal; overflow-wrap: break-word; min-width: 8em; }
.best { background: var(--best); font-weight: 650; border-radius: 4px; padding: 3px 5px; margin: 0 -5px; }
.mark { color: var(--flag); font-weight: 650; line-height: 0; width: 0; display: inline-block;
  position: relative; left: 1px; }
.best .mark { left: 5px; }
.flags { background: var(--flagged); border: 1px solid var(--line); border-left: 4px solid var(--flag); border-radius: 8px;
  padding: 12px 16px; margin: 14px 0 0; font-size: 0.9375rem; }
.flags p { margin: 0; font-weight: 650; }
.flags ul { margin: 6px 0 0; padding-left: 1.2em; overflow-wrap: anywhere; }
.flags li + li { margin-top: 4px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 9px; }
figure { margin: 0 0 28px; }
picture { display: block; background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 14px; }
img { display: block; width: 100%; height: auto; margin: 0 auto; }
dl { margin: 0; max-width: 56em; }
dt { font-weight: 600; margin-top: 14px; }
dd { margin: 2px 0 0; }
.settings { display: block; color: var(--soft); font-size: 0.875rem; }
details { border-top: 1px solid var(--line); padding: 12px 0; }
summary { cursor: pointer; font-weight: 600; }
details > :not(summary) { margin-top: 12px; }
details table { font-size: 0.8125rem; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; font-size: 0.875rem; }
.facts dt { margin: 0; font-weight: 400; color: var(--soft); }
.facts dd { margin: 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; overflow: auto; }
footer { margin-top: 44px; color: var(--soft); font-size: 0.8125rem; }
.wide { font-size: 0.875rem; } .wide th, .wide td { padding: 7px 8px; }
@media screen and (min-width: 1100px) {
  /* Tables of many columns may be wider than the text. */
  section > .scroll:has(.wide, .wider), details > .scroll:has(.wide, .wider) {
    margin-inline: calc((1004px - min(100vw - 72px, 1320px)) / 2); } }
@media screen and (max-width: 640px) {
  main { padding: 30px 16px 48px; } h1 { font-size: 1.5rem; } p.lead { font-size: 1rem; } h2 { margin-top: 40px; }
  th, td { padding: 8px 11px; } picture { padding: 8px; } img { max-width: 100% !important; }
  /* What a row is about stays in sight while its numbers scroll. */
  th.text:first-child, td.text:first-child { position: sticky; left: 0; z-index: 1; background: var(--card);
    min-width: 8.5rem; max-width: 9.5rem; white-space: normal; overflow-wrap: anywhere; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dt { margin-top: 8px; } }
@media print {
  :root { color-scheme: light; --page: #fff; }
  @page { margin: 14mm; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 10.5pt; line-height: 1.45; }
  main { max-width: none; padding: 0; }
  h1 { font-size: 19pt; } h2 { margin-top: 24pt; }
  h2, h3, summary, dt, thead { break-after: avoid; }
  figure, thead, tr, dd, .flags, p.note { break-inside: avoid; }
  p.note, figcaption { break-before: avoid; }
  /* Paper does not scroll, open or take clicks: tables wrap and shrink, what is folded is open, controls are plain. */
  .scroll { overflow: visible; border: 0; border-radius: 0; }
  table, details table { font-size: 8.5pt; }
  table.wide { font-size: 7.5pt; } table.wider { font-size: 6pt; }
  th, td { white-space: normal; padding: 4px 5px; font-size: 1em; }
  .wide th, .wide td, .wider th, .wider td { padding: 3px 4px; }
  .sd { white-space: nowrap; } .mark { position: static; width: auto; }
  th.text, td.text { overflow-wrap: anywhere; min-width: 5em; } .wider td.text { min-width: 3.2em; }
  td.text:first-child { min-width: 8em; }
  .wrap { min-width: 0; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; overflow: visible; font-size: 7.5pt; }
  img { width: auto; max-height: 235mm; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
  summary { list-style: none; } summary::-webkit-details-marker { display: none; }
  abbr { text-decoration: none; }
  /* A button is not painted again in the heading of the next page, what is in it is. */
  th button { display: contents; } th button::after { position: static; } }
"""

# Headings become buttons only here, for without a script there is nothing to press. Rows keep their order where they are alike,
# so that one sorts by two columns by pressing the lesser one first; what is absent stands last in both orders.
SCRIPT = r"""
const words = new Intl.Collator("en", {numeric: true});
for (const table of document.querySelectorAll(".scroll > table")) {
  const body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  for (const heading of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(table.tHead.rows[0], body, heading));
  }
}

function sort(headings, body, heading) {
  const order = heading.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  for (const other of headings.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const texts = new Map([...body.rows].map(row => [row, row.cells[heading.cellIndex].textContent.trim()]));
  const absent = text => text === "-" || text === "";
  const numbers = [...texts.values()].every(text => absent(text) || !isNaN(number(text)));
  body.append(...[...body.rows].sort((one, other) => {
    const a = texts.get(one), b = texts.get(other);
    if (absent(a) || absent(b)) return absent(a) - absent(b);
    return sign * (numbers ? number(a) - number(b) : words.compare(a, b));
  }));
}

// The number at the beginning of "1,234", "93.0 \u00b1 2.0\u2020", "\u22120.5", "12 s" or "40 %".
function number(text) {
  const match = /^([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)( ?[%s])?( \u00b1 .*)?[\u2020\u2021]*$/.exec(text.replace("\u2212", "-"));
  return match ? Number(match[1].replaceAll(",", "")) : NaN;
}
"""
