// A table that is filled again and again: rows are kept by their key, so focus and selection survive a refresh.

import { el, write } from "./dom.js";

/**
 * `columns`: { head, cell(row) -> text or element, sign(row) -> text that changes when an element must be made anew,
 * kind: class names, such as "number", and "wide" for what narrow screens do not show }. The first column names the row.
 * On narrow screens the rows of a `stacked` table are blocks: it is a table by its roles then, too.
 */
export function makeTable(columns, { testid, caption, stacked = false, rowTestid = () => null }) {
  const heads = columns.map((column) =>
    el("th", { scope: "col", role: "columnheader", class: column.kind }, column.head),
  );
  const body = el("tbody", { role: "rowgroup" });
  const head = el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, heads));
  const table = el(
    "table",
    { role: "table", test: testid, class: stacked && "stacked" },
    el("caption", { class: "unseen" }, caption),
    head,
    body,
  );
  const kept = new Map();
  return {
    table,
    /** `rows` with a `key` each, in their order. */
    fill(rows) {
      const wanted = rows.map((row) => {
        const line = kept.get(row.key) ?? newLine(columns, rowTestid(row));
        kept.set(row.key, line);
        columns.forEach((column, i) => fillCell(line.cells[i], column, row));
        return line;
      });
      const keys = new Set(rows.map((row) => row.key));
      for (const [key, line] of kept) if (!keys.has(key)) (line.remove(), kept.delete(key));
      wanted.forEach((line, i) => body.children[i] !== line && body.insertBefore(line, body.children[i] ?? null));
    },
  };
}

function newLine(columns, testid) {
  const cells = columns.map(({ kind, head }, i) =>
    i === 0
      ? el("th", { scope: "row", role: "rowheader", class: kind })
      : el("td", { role: "cell", class: kind, "data-head": head }),
  );
  return el("tr", { role: "row", test: testid }, cells);
}

function fillCell(cell, column, row) {
  if (!column.sign) return write(cell, column.cell(row));
  const sign = column.sign(row);
  if (cell.sign === sign) return undefined;
  cell.sign = sign;
  cell.replaceChildren(...[column.cell(row)].flat().filter(Boolean));
  return undefined;
}

/** A table may be wider than a phone: it scrolls by itself, also by keyboard, and the page does not. */
export const scrolling = (name, ...children) =>
  el("div", { class: "scrolling", role: "region", "aria-label": name, tabindex: "0" }, ...children);
