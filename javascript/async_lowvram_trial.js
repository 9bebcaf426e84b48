/*
 * "Try it": stock and asynchronous moving in turn on the loaded model, started and stopped from here, with progress and a result table.
 *
 * The server runs it in its queue; what it does is in the status (`trial`), so nothing here remembers but what a press answered.
 */
"use strict";
window.asyncLowvram = window.asyncLowvram || {};
(function(ours) {
    const h = (...given) => ours.element(...given);

    /** `ask(start)` -> {ok, reason, code}. Gives {root, buttons, hint, update(trial)}; trial null: nothing to try, all of it is hidden. */
    ours.makeTrial = function(ask) {
        const {t} = ours;
        const start = h("button", {type: "button", className: "alv-button", "data-do": "try"}, [t("Try it")]);
        const stop = h("button", {type: "button", className: "alv-button", "data-do": "stop", hidden: true}, [t("Stop the trial")]);
        const hint = h("span", {className: "alv-quiet"}, [t("stock and async in turn, about ten seconds, in the queue like any job")]);
        const words = h("p", {className: "alv-trial-state", role: "status"});
        const progress = h("div", {
            className: "alv-progress", role: "progressbar", "aria-label": t("Trial"), "aria-valuemin": "0", "aria-valuemax": "100",
        }, [h("span", {})]);
        const body = h("tbody", {}), verdict = h("p", {className: "alv-verdict"});
        const table = h("table", {className: "alv-result"}, [h("caption", {}, [""]), h("thead", {}, [h("tr", {}, [
            h("th", {scope: "col"}, [t("Moving")]), h("th", {scope: "col"}, [t("time per pass")]), h("th", {scope: "col"}, [t("speed")]),
        ])]), body]);
        const root = h("section", {className: "alv-section alv-trial"}, [words, progress, table, verdict]);
        let pressed = "", shown = null, asking = false;

        async function press(starts) {
            if (asking) return;
            asking = true; // the buttons are not disabled: the one that is pressed would lose the focus
            pressed = "";
            const answer = await ask(starts);
            asking = false;
            if (!answer.ok) {
                const reason = answer.reason ? t(answer.reason) : answer.code ? `HTTP ${answer.code}` : t("No answer from the WebUI");
                pressed = starts ? t("The trial was not started: {reason}", {reason}) : t("The trial was not stopped: {reason}", {reason});
            }
            update(shown);
        }
        start.addEventListener("click", () => press(true));
        stop.addEventListener("click", () => press(false));

        function row(id, label, seconds) {
            const time = ours.positive(seconds) ? ours.seconds(seconds) : ours.UNKNOWN;
            return h("tr", {"data-row": id}, [h("th", {scope: "row"}, [label]), h("td", {}, [time]), h("td", {}, [ours.speed(seconds)])]);
        }

        function fill(result) {
            const caption = [];
            if (typeof result.shape === "string" && result.shape) caption.push(result.shape);
            if (ours.positive(result.passes)) caption.push(t("{n} passes", {n: result.passes}));
            ours.setText(table.caption, caption.join(" · "));
            body.replaceChildren(row("stock", t("Stock"), result.stock_seconds), row("async", t("Async"), result.async_seconds),
                row("limit", t("Limit"), result.limit_seconds));
            const told = [];
            if (ours.positive(result.ratio)) told.push(t("{times} times as fast as stock", {times: ours.times(result.ratio)}));
            if (typeof result.equal === "boolean") told.push(result.equal ? t("same bits: yes") : t("same bits: no"));
            ours.setText(verdict, told.join(" · "));
            ours.setAttribute(verdict, "data-equal", String(result.equal));
        }

        let drawn = "";
        function update(trial) {
            shown = trial;
            const state = (trial && trial.state) || "idle", runs = state === "waiting" || state === "running";
            const focus = document.activeElement;
            ours.show(stop, Boolean(trial) && runs);
            ours.show(start, Boolean(trial) && !runs);
            ours.show(hint, Boolean(trial) && !runs);
            if (runs && focus === start) stop.focus();
            if (!runs && focus === stop) start.focus();
            const share = trial && ours.known(trial.progress) ? Math.max(0, Math.min(1, trial.progress)) : 0;
            ours.show(progress, runs);
            progress.firstChild.style.width = `${(share * 100).toFixed(1)}%`;
            ours.setAttribute(progress, "aria-valuenow", Math.round(share * 100));
            const reason = trial && typeof trial.reason === "string" && trial.reason ? t(trial.reason) : "";
            const said = {
                waiting: t("Waiting for the queue"), running: t("Measuring"), done: "",
                failed: trial && trial.reason === "stopped" ? t("The trial was stopped")
                    : t("The trial failed: {reason}", {reason: reason || t("no reason given")}),
                idle: reason,
            }[state];
            ours.setText(words, pressed && !runs ? pressed : said || "");
            ours.show(words, Boolean(words.textContent));
            const result = state === "done" ? trial.result : null, now = JSON.stringify(result);
            ours.show(table, Boolean(result));
            ours.show(verdict, Boolean(result));
            if (result && now !== drawn) fill(result);
            drawn = now;
            ours.show(root, Boolean(trial) && (runs || Boolean(result) || !words.hidden));
        }
        return {root, buttons: [start, stop], hint, update};
    };
})(window.asyncLowvram);
