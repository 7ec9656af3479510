"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const chooser = document.getElementById("user");
  const found = document.getElementById("found");
  const answer = document.getElementById("answer");
  let by = data.methods[0];

  // Every text is set as text, never as HTML.
  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const title = (place) => data.items[place][1] || data.items[place][0];
  const rank = (user, method) => {
    const place = user.candidates.indexOf(user.target);
    return user.ranks[method] && place >= 0 ? user.ranks[method][place] : null;
  };
  const texts = data.users.map((user) =>
    [user.id, ...[...user.history, ...user.candidates, user.target].map((place) => data.items[place].join(" "))]
      .join("\n")
      .toLowerCase()
  );
  const table = (caption, header, rows) => {
    const body = element("tbody");
    for (const row of rows) {
      const line = element("tr", row.target ? { class: "target" } : {});
      row.cells.forEach((cell, n) => line.append(element(n ? "td" : "th", n ? {} : { scope: "row" }, cell)));
      body.append(line);
    }
    const head = element("tr");
    header.forEach((cell) => head.append(element("th", { scope: "col" }, cell)));
    const box = element("div", { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" });
    box.append(
      element("table", {}, element("caption", { class: "hidden" }, caption), element("thead", {}, head), body)
    );
    return box;
  };

  function show(focus) {
    const user = data.users[chooser.value];
    answer.replaceChildren();
    if (!user) return;
    const methods = data.methods.filter((name) => user.ranks[name]);
    if (!methods.includes(by)) by = methods[0];
    answer.append(element("h3", {}, `User ${user.id}: history`));
    if (user.earlier) {
      answer.append(element("p", { class: "note" }, `The last items of the history, after ${user.earlier} earlier ones, oldest first.`));
    }
    answer.append(
      table(`History of user ${user.id}`, ["item", "id"], user.history.map((place) => ({ cells: [title(place), data.items[place][0]] })))
    );
    answer.append(element("h3", {}, `Candidates in the order of ${by}`));
    const header = ["candidate", ...methods.map((name) => {
      const button = element("button", { type: "button", "aria-pressed": String(name === by), "data-method": name }, name);
      button.addEventListener("click", () => { by = name; show(name); });
      return button;
    }), "target", "id"];
    const rows = user.candidates
      .map((place, n) => ({
        order: user.ranks[by][n],
        target: place === user.target,
        cells: [title(place), ...methods.map((name) => String(user.ranks[name][n])), place === user.target ? "target" : "", data.items[place][0]],
      }))
      .sort((one, other) => one.order - other.order);
    answer.append(element("p", { class: "note" }, "Numbers are ranks, best first. The name of a method orders the table by it."));
    answer.append(table(`Candidates of user ${user.id}, ordered by ${by}`, header, rows));
    for (const [name, given] of Object.entries(user.answers)) {
      answer.append(element("h3", {}, `Reasoning of ${name} (${given.status})`));
      answer.append(element("blockquote", {}, given.reasoning));
      if (given.statements === null) {
        answer.append(element("p", { class: "note" }, "Not checked: only sentences of the rules teacher can be checked."));
      } else {
        const line = element("p", {}, "Statements: ");
        Object.entries(given.statements).forEach(([kind, holds], n) => {
          line.append(n ? ", " : "", element("span", { class: holds ? "true" : "false" }, `${kind} ${holds ? "true ✓" : "false ✗"}`));
        });
        answer.append(line);
      }
    }
    if (focus) answer.querySelector(`button[data-method="${CSS.escape(focus)}"]`).focus();
  }

  function list() {
    const words = search.value.trim().toLowerCase();
    const before = chooser.value;
    const method = sort.value.slice(3);
    const gain = (n) => (rank(data.users[n], data.methods[0]) ?? 0) - (rank(data.users[n], method) ?? 0);
    const matching = data.users.map((_, n) => n).filter((n) => texts[n].includes(words));
    if (sort.value.startsWith("up:")) matching.sort((one, other) => gain(other) - gain(one));
    if (sort.value.startsWith("dn:")) matching.sort((one, other) => gain(one) - gain(other));
    chooser.replaceChildren(
      ...matching.map((n) => {
        const user = data.users[n];
        const ranks = method ? ` (rank ${rank(user, data.methods[0]) ?? "none"} to ${rank(user, method) ?? "none"})` : "";
        return element("option", { value: String(n) }, `${user.id}${ranks}: ${title(user.target)}`);
      })
    );
    chooser.value = matching.includes(Number(before)) && before !== "" ? before : String(matching[0] ?? "");
    found.textContent = `${matching.length} of ${data.users.length} users`;
    show();
  }

  sort.append(element("option", { value: "" }, "as in the data"));
  for (const name of data.methods.slice(1)) {
    sort.append(element("option", { value: `up:${name}` }, `${name} moves the target up most`));
    sort.append(element("option", { value: `dn:${name}` }, `${name} moves the target down most`));
  }
  search.addEventListener("input", list);
  sort.addEventListener("change", list);
  chooser.addEventListener("change", () => show());
  if (window.matchMedia("(max-width: 899px)").matches) document.querySelector("nav details").open = false;
  list();
})();
