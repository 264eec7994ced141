// The overview of the tricks: two groups of buttons that show the cards of a goal and a budget. Without scripts all cards show.
document.addEventListener("DOMContentLoaded", () => {
  const bar = document.querySelector(".trick-filter");
  if (!bar) return;
  const cards = [...document.querySelectorAll(".trick-card")];
  const chosen = { goal: "", budget: "" };
  const count = document.createElement("output");
  const show = () => {
    const shown = cards.filter((card) => {
      const fits = Object.values(chosen).every((name) => !name || card.classList.contains(name));
      (card.closest(".sd-col") ?? card).style.display = fits ? "" : "none";
      return fits;
    });
    count.textContent = `${shown.length} of ${cards.length} tricks`;
  };
  for (const kind of Object.keys(chosen)) {
    const group = bar.appendChild(document.createElement("div"));
    group.setAttribute("role", "group");
    group.setAttribute("aria-label", kind);
    group.append(`${kind}:`);
    const buttons = ["", ...bar.dataset[kind].split(" ")].map((name) => {
      const button = group.appendChild(document.createElement("button"));
      button.type = "button";
      button.textContent = name.replace(`${kind}-`, "").replaceAll("-", " ") || "any";
      button.setAttribute("aria-pressed", String(!name));
      button.addEventListener("click", () => {
        chosen[kind] = name;
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        show();
      });
      return button;
    });
  }
  bar.append(count);
  show();
});
