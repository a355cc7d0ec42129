// Search, choice and order of the rows of a table of samples. Texts stand in the page already, and stay text.
const SCREENFUL = 40;
for (const section of document.querySelectorAll("section.samples")) {
  const [find, kind, order] = section.querySelectorAll("input, select");
  const body = section.querySelector("tbody");
  const count = section.querySelector("output");
  const more = section.querySelector("button");
  const rows = [...body.rows].map((row, place) => ({
    row, place, text: row.textContent.toLowerCase(), kind: row.dataset.kind,
    reward: Number(row.dataset.reward), length: Number(row.dataset.length),
  }));
  const orders = {
    newest: (a, b) => a.place - b.place,
    lowest: (a, b) => a.reward - b.reward || a.place - b.place,
    highest: (a, b) => b.reward - a.reward || a.place - b.place,
    longest: (a, b) => b.length - a.length || a.place - b.place,
  };
  let most = SCREENFUL;
  const show = () => {
    const words = find.value.toLowerCase().split(/\s+/);
    const found = rows.filter(({ text, kind: of }) =>
      (kind.value === "all" || of === kind.value) && words.every((word) => text.includes(word)));
    found.sort(orders[order.value]);
    for (const { row } of rows) row.hidden = true;
    for (const { row } of found.slice(0, most)) row.hidden = false;
    body.append(...found.map(({ row }) => row));
    more.hidden = found.length <= most;
    count.textContent = `${found.length} found, ${Math.min(most, found.length)} shown`;
  };
  for (const control of [find, kind, order]) {
    control.addEventListener("input", () => { most = SCREENFUL; show(); });
  }
  more.addEventListener("click", () => { most += SCREENFUL; show(); });
  section.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  section.querySelector("form").hidden = false;
  show();
}
