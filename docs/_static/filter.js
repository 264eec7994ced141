// The overview of the tricks: buttons that show the cards of a goal or a budget. Without scripts all cards show.
document.addEventListener("DOMContentLoaded", () => {
  const bar = document.querySelector(".trick-filter");
  if (!bar) return;
  const cards = [...document.querySelectorAll(".trick-card")];
  const tags = [...new Set(cards.flatMap((card) => [...card.classList].filter((name) => name.startsWith("tag-"))))].sort();
  const buttons = ["all", ...tags].map((tag) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = tag.replace("tag-", "").replaceAll("-", " ");
    button.setAttribute("aria-pressed", String(tag === "all"));
    button.addEventListener("click", () => {
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      cards.forEach((card) => {
        const column = card.closest(".sd-col") ?? card;
        column.style.display = tag === "all" || card.classList.contains(tag) ? "" : "none";
      });
    });
    bar.append(button);
    return button;
  });
});
