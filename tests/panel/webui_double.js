/* A double of what the WebUI's own script gives to scripts of extensions: the callbacks, when they are called, and where the page is. */
"use strict";
(function() {
    const called = {update: [], after: [], loaded: [], tab: []};
    let isLoaded = false, tab = null, timer = null;
    window.gradioApp = () => document;
    window.onUiUpdate = (callback) => called.update.push(callback);
    window.onAfterUiUpdate = (callback) => called.after.push(callback);
    window.onUiLoaded = (callback) => called.loaded.push(callback);
    window.onUiTabChange = (callback) => called.tab.push(callback);
    window.opts = {};
    const run = (callbacks, given) => callbacks.forEach((callback) => callback(given));
    document.addEventListener("DOMContentLoaded", () => {
        new MutationObserver((changes) => {
            window.seenChanges = (window.seenChanges || 0) + changes.length;
            if (!isLoaded && document.querySelector("#txt2img_prompt")) {
                isLoaded = true;
                run(called.loaded);
            }
            run(called.update, changes);
            clearTimeout(timer);
            timer = setTimeout(() => run(called.after), 200);
            const now = document.querySelector("#tabs > .tab-nav > button.selected");
            if (now && now !== tab) {
                tab = now;
                run(called.tab);
            }
        }).observe(document, {childList: true, subtree: true});
    });
})();
