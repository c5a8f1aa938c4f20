(() => {
  "use strict";
  // Without this script the slider stays hidden and the table has every budget.
  const bar = document.getElementById("budget");
  const table = document.getElementById("answers");
  const slider = document.getElementById("step");
  const every = document.getElementById("every");
  const titles = Array.from(document.getElementById("steps").options, (one) => one.label);
  const show = () => {
    const title = titles[Number(slider.value)];
    slider.disabled = every.checked;
    slider.setAttribute("aria-valuetext", title);
    bar.querySelector("output").textContent = every.checked ? "all" : title;
    if (every.checked) delete table.dataset.at;
    else table.dataset.at = slider.value;
  };
  slider.addEventListener("input", show);
  every.addEventListener("change", show);
  bar.hidden = false;
  show();
})();
