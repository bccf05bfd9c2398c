"use strict";
(() => {
  const form = document.querySelector(".tools");
  const body = document.querySelector(".verdicts tbody");
  if (!form || !body) return;

  const rows = [...body.rows];
  const heads = [...document.querySelectorAll(".verdicts thead th")];
  const filters = [...form.querySelectorAll("[data-verdict]")];
  const status = form.querySelector("[role=status]");
  const clear = form.querySelector("[type=reset]");
  const texts = new Map(
    rows.map((row) => [row, `${row.dataset.experiment} ${row.textContent}`.toLowerCase()]),
  );
  const collator = new Intl.Collator("en", { numeric: true });

  function filter() {
    const words = form.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = filters.filter(isPressed).map((button) => button.dataset.verdict);
    // A button counts what it would show, so it is not bound by the verdicts that are pressed.
    const found = rows.filter(
      (row) =>
        (!form.experiment.value || row.dataset.experiment === form.experiment.value) &&
        words.every((word) => texts.get(row).includes(word)),
    );
    const shown = new Set(
      found.filter((row) => !wanted.length || wanted.includes(row.dataset.verdict)),
    );
    for (const row of rows) row.hidden = !shown.has(row);
    for (const button of filters) {
      const count = found.filter((row) => row.dataset.verdict === button.dataset.verdict).length;
      button.querySelector("b").textContent = count;
    }
    status.textContent = tell(shown);
    clear.hidden = !words.length && !wanted.length && !form.experiment.value;
  }

  function tell(shown) {
    const count = (kind, some) => some.filter((row) => row.dataset.kind === kind).length;
    const claims = `${count("claim", [...shown])} of ${count("claim", rows)} claims shown`;
    const failed = count("failure", rows);
    return failed
      ? `${claims}, ${count("failure", [...shown])} of ${failed} failed experiments`
      : claims;
  }

  function sort() {
    const [column, order] = form.order.value.split(" ");
    heads.forEach((head, index) => {
      if (order && index === Number(column)) head.setAttribute("aria-sort", order);
      else head.removeAttribute("aria-sort");
    });
    body.append(...(order ? [...rows].sort((a, b) => compare(a, b, column, order)) : rows));
  }

  function compare(a, b, column, order) {
    const [first, second] = [a, b].map((row) => row.cells[column].dataset.key);
    // What has no key stays last, whatever the order.
    if (!first || !second) return Boolean(second) - Boolean(first);
    const [left, right] = [Number(first), Number(second)];
    const difference =
      Number.isNaN(left) || Number.isNaN(right)
        ? collator.compare(first, second)
        : left - right;
    return order === "descending" ? -difference : difference;
  }

  function isPressed(button) {
    return button.getAttribute("aria-pressed") === "true";
  }

  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      form.order.value = `${index} ${order}`;
      sort();
    });
  });
  for (const button of filters) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(!isPressed(button)));
      filter();
    });
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);
  form.order.addEventListener("change", sort);
  form.addEventListener("reset", (event) => {
    // The order stays: what is cleared is what hides rows.
    event.preventDefault();
    form.words.value = form.experiment.value = "";
    for (const button of filters) button.setAttribute("aria-pressed", "false");
    filter();
    form.words.focus();
  });

  // A browser that goes back restores the fields, and the rows must agree with them.
  addEventListener("pageshow", () => {
    filter();
    sort();
  });
  filter();
  form.hidden = false;
})();
