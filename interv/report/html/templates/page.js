(() => {
  "use strict";
  const tip = document.getElementById("tip");
  const ring = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  ring.setAttribute("class", "ring");
  let marked = null;

  const hide = () => {
    tip.hidden = true;
    ring.remove();
    marked = null;
  };

  const show = (square) => {
    // The browser's own hint would come up beside ours.
    const title = square.querySelector("title");
    if (title) {
      square.dataset.tip = title.textContent;
      title.remove();
    }
    hide();
    marked = square;
    for (const name of ["x", "y", "width", "height"]) ring.setAttribute(name, square.getAttribute(name));
    square.parentNode.append(ring);
    tip.textContent = square.dataset.tip;
    tip.hidden = false;
    const box = square.getBoundingClientRect();
    const page = document.documentElement.clientWidth;
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    tip.style.left = Math.max(6, Math.min(left, page - tip.offsetWidth - 6)) + "px";
    const above = box.top - tip.offsetHeight - 8;
    tip.style.top = (above > 4 ? above : box.bottom + 8) + "px";
  };

  const squareOf = (target) => (target.closest ? target.closest("svg.heat rect") : null);

  document.addEventListener("pointerover", (event) => {
    const square = squareOf(event.target);
    if (square) show(square);
    else if (event.pointerType === "mouse") hide();
  });
  document.addEventListener("click", (event) => {
    const square = squareOf(event.target);
    if (square) show(square);
    else hide();
  });
  document.addEventListener("scroll", hide, { capture: true, passive: true });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const chart = document.activeElement;
    if (!chart || !chart.matches("svg.heat")) return;
    const columns = Number(chart.dataset.columns);
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    if (!move) return;
    event.preventDefault();
    const squares = [...chart.querySelectorAll("rect:not(.ring)")];
    const here = squares.indexOf(marked);
    const next = here < 0 ? 0 : here + move;
    if (squares[next]) show(squares[next]);
  });

  const valueOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v !== undefined ? cell.dataset.v : cell.textContent;
  };
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const difference = Number(a) - Number(b);
    return Number.isNaN(difference) ? a.localeCompare(b) : difference;
  };
  for (const table of document.querySelectorAll("table[data-sortable]")) {
    table.querySelectorAll("thead th").forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") === "descending";
        table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", falling ? "ascending" : "descending");
        const sign = falling ? 1 : -1;
        const body = table.tBodies[0];
        const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
        rows.sort(([a], [b]) => (a === "" || b === "" ? compare(a, b) : sign * compare(a, b)));
        body.append(...rows.map(([, row]) => row));
      });
    });
  }

  for (const input of document.querySelectorAll("input[data-table]")) {
    const line = input.closest(".filter");
    const rows = [...document.getElementById(input.dataset.table).tBodies[0].rows];
    line.hidden = rows.length < 10;
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        left += !row.hidden;
      }
      line.querySelector("output").textContent = left + (left === 1 ? " row" : " rows");
    });
  }

  // What is folded up on screen is not on paper.
  const folded = [];
  addEventListener("beforeprint", () => {
    hide();
    for (const one of document.querySelectorAll("details:not([open])")) {
      folded.push(one);
      one.open = true;
    }
  });
  addEventListener("afterprint", () => {
    for (const one of folded.splice(0)) one.open = false;
  });
})();
