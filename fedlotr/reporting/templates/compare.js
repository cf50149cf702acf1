"use strict";
// Over tables that are whole without it: which runs and columns are shown, and in which order.
const made = (tag, text = "", more = {}) => Object.assign(document.createElement(tag), { textContent: text, ...more });
const value = (cell) => cell.querySelector("data")?.value ?? cell.textContent;

function number(cell) {
  const text = value(cell).replaceAll(",", "");
  return text.trim() === "" || text === "–" ? NaN : Number(text);
}

function sorting(table) {
  const [head] = table.tHead.rows, [body] = table.tBodies;
  [...head.cells].forEach((title, at) => {
    const button = made("button", title.textContent, { type: "button", className: "sort" });
    title.replaceChildren(button);
    button.onclick = () => {
      const down = title.ariaSort === "ascending";
      for (const other of head.cells) other.removeAttribute("aria-sort");
      title.ariaSort = down ? "descending" : "ascending";
      const rows = [...body.rows], sign = down ? -1 : 1;
      const known = rows.filter((row) => value(row.cells[at]) !== "–");
      const numbers = known.every((row) => !Number.isNaN(number(row.cells[at])));
      known.sort((a, b) => sign * (numbers ? number(a.cells[at]) - number(b.cells[at])
        : value(a.cells[at]).localeCompare(value(b.cells[at]), undefined, { numeric: true })));
      body.append(...known, ...rows.filter((row) => !known.includes(row)));
    };
  });
}

function show(table, at, shown) {
  for (const row of table.rows) row.cells[at].hidden = !shown;
}

function choosing(table) {
  const names = [...table.tHead.rows[0].cells].map((title) => title.textContent);
  const rows = [...table.tBodies[0].rows];
  const box = made("details"), list = made("div", "", { className: "choices" });
  const boxes = names.map((name, at) => {
    const tick = made("input", "", { type: "checkbox", checked: true, disabled: at === 0 });
    tick.onchange = () => show(table, at, tick.checked);
    const label = made("label");
    label.append(tick, name);
    list.append(label);
    return tick;
  });
  const button = (text, wanted) => {
    const found = made("button", text, { type: "button" });
    found.onclick = () => boxes.forEach((tick, at) => {
      tick.checked = at === 0 || wanted(at);
      show(table, at, tick.checked);
    });
    return found;
  };
  const differs = (at) => new Set(rows.map((row) => value(row.cells[at]))).size > 1;
  box.append(made("summary", "Columns"), button("all", () => true), button("those that differ", differs), list);
  return box;
}

function filtering(table, beside) {
  const names = [...table.tHead.rows[0].cells].map((title) => title.textContent.toLowerCase());
  const rows = [...table.tBodies[0].rows].map((row) => {
    const known = [...row.cells].flatMap((cell, at) => {
      const text = cell.textContent;
      return [text, text.replaceAll(",", ""), value(cell)].map((one) => `${names[at]}=${one.toLowerCase()}`);
    });
    return { row, known, name: row.cells[0].textContent };
  });
  const titles = [...(beside?.tHead.rows[0].cells ?? [])].map((title) => title.textContent);
  const label = made("label", "Runs with "), said = made("output");
  const field = made("input", "", { type: "search", placeholder: "lora seed=1" });
  field.oninput = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (known) => words.every((word) => known.some(
      (one) => word.includes("=") ? one === word : one.slice(one.indexOf("=") + 1).includes(word)));
    let count = 0;
    for (const { row, known, name } of rows) {
      row.hidden = !fits(known);
      count += !row.hidden;
      const at = titles.indexOf(name, 1);
      if (at > 0) show(beside, at, !row.hidden);
    }
    said.textContent = words.length ? `${count} of ${rows.length} runs; plots show all` : "";
  };
  label.append(field);
  const line = made("div", "", { className: "tools" });
  line.append(label, said);
  return line;
}

const [runs, differing] = ["runs", "differing"].map((id) => document.querySelector(`#${id} table`));
const place = runs.closest("details");
place.before(filtering(runs, differing), choosing(runs));
document.querySelectorAll("table").forEach(sorting);
