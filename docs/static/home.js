// The home page's pairs: a word of a caption lights up its region, one after another until somebody takes over.
document.addEventListener("DOMContentLoaded", () => {
  const place = document.getElementById("pairs");
  if (!place) return;
  let timer = null, at = 0;
  const stop = () => { clearInterval(timer); timer = null; };
  const chooser = document.createElement("div"), stage = document.createElement("div");
  chooser.className = "al-chooser";
  chooser.setAttribute("role", "group");
  chooser.setAttribute("aria-label", "captions");
  function show(number, word) {
    chooser.querySelectorAll("button").forEach((b, i) => b.setAttribute("aria-pressed", String(i === number)));
    const view = pairView(pairs[number]);
    view.addEventListener("click", stop, true);
    view.addEventListener("focusin", stop);
    stage.replaceChildren(view);
    const told = pairs[number].words.map((w, i) => i).filter(i => pairs[number].words[i].score > .1);
    at = word ?? 0;
    view.light({ word: told[0] });
    return { view, told };
  }
  pairs.forEach((pair, number) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = pair.caption;
    button.addEventListener("click", () => { stop(); show(number); });
    chooser.append(button);
  });
  place.replaceChildren(chooser, stage);
  let number = 0, now = show(0);
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  timer = setInterval(() => {
    if (++at < now.told.length) { now.view.light({ word: now.told[at] }); return; }
    number = (number + 1) % pairs.length;
    now = show(number);
  }, 1600);
});
